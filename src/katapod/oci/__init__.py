"""oci: the entry point for OCI engines: runc's command line, as Podman, Buildah, Docker and containerd drive it.

Each command is short: it reads its words, asks the supervisor of the container on a unix socket, and prints. What it
loads counts several times for each container, so commands import neither asyncio, click nor msgspec, and each its
verb's module alone. The supervisor (supervisor.py and what it imports) is forked off by `create` and loads the rest.
"""
