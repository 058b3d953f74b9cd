"""`kata-runtime run`: the flags, in the words that users of `docker run` know."""

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from katapod.cli import is_loaded
from katapod.cli.settings import Globals, need_root
from katapod.host.trace import span
from katapod.model.errors import UsageError
from katapod.model.flags import (
    need_text,
    parse_cap,
    parse_cpus,
    parse_env,
    parse_env_file,
    parse_group,
    parse_hostname,
    parse_label,
    parse_memory,
    parse_pids_limit,
    parse_signal,
    parse_size,
    parse_sysctl,
    parse_tmpfs,
    parse_ulimit,
    parse_user,
    parse_volume,
    parse_workdir,
)
from katapod.model.ids import new_id, parse_container_name, short_id
from katapod.model.net_flags import (
    NetworkRequest,
    parse_add_host,
    parse_dns,
    parse_ip,
    parse_mac,
    parse_network,
    parse_publish,
)

if TYPE_CHECKING:
    from katapod.model import oci
    from katapod.model.seccomp_profile import SeccompProfile
    from katapod.plan.container_spec import ContainerOptions

__all__ = ["register"]

Texts = list[str]


def register(app: typer.Typer) -> None:
    app.command(
        "run",
        context_settings={"allow_interspersed_args": False, "help_option_names": ["--help"]},
        short_help="Run a command in a container in a virtual machine of its own.",
    )(run)


def run(
    context: typer.Context,
    words: Annotated[
        Texts | None,
        typer.Argument(
            metavar="IMAGE [COMMAND...]",
            help="A stored image, or oci:PATH, oci-archive:FILE, docker-archive:FILE, docker://HOST/NAME:TAG. "
            "With --rootfs or --bundle there is no IMAGE.",
        ),
    ] = None,
    remove: Annotated[bool, typer.Option("--rm", help="Remove the container when it ends.")] = False,
    interactive: Annotated[bool, typer.Option("-i", "--interactive", help="Keep standard input open.")] = False,
    tty: Annotated[bool, typer.Option("-t", "--tty", help="Give the container a terminal.")] = False,
    detach: Annotated[bool, typer.Option("-d", "--detach", help="Run in the background; print the name.")] = False,
    name: Annotated[str, typer.Option(help="Name of the container; default: a random id.")] = "",
    env: Annotated[Texts | None, typer.Option("-e", "--env", metavar="K[=V]", help="Set a variable.")] = None,
    env_file: Annotated[Texts | None, typer.Option(metavar="FILE", help="Read variables from a file.")] = None,
    workdir: Annotated[str, typer.Option("-w", "--workdir", metavar="DIR", help="Working directory.")] = "",
    user: Annotated[str, typer.Option("-u", "--user", metavar="USER[:GROUP]", help="User, by name or id.")] = "",
    group_add: Annotated[Texts | None, typer.Option(metavar="GROUP", help="Add the user to a group, too.")] = None,
    volume: Annotated[
        Texts | None, typer.Option("-v", "--volume", metavar="SRC:DST[:ro]", help="Mount a host file or directory.")
    ] = None,
    tmpfs: Annotated[Texts | None, typer.Option(metavar="DST[:OPTS]", help="Mount a tmpfs.")] = None,
    memory: Annotated[
        str, typer.Option("-m", "--memory", metavar="SIZE", help="Memory limit (512m, 2g); sizes the VM too.")
    ] = "",
    cpus: Annotated[str, typer.Option(metavar="N", help="CPU limit (1.5); sizes the VM too.")] = "",
    pids_limit: Annotated[str, typer.Option(metavar="N", help="Limit of processes.")] = "",
    read_only: Annotated[bool, typer.Option("--read-only", help="Read-only root file system.")] = False,
    cap_add: Annotated[Texts | None, typer.Option(metavar="CAP", help="Add a capability, or ALL.")] = None,
    cap_drop: Annotated[Texts | None, typer.Option(metavar="CAP", help="Drop a capability, or ALL.")] = None,
    privileged: Annotated[bool, typer.Option("--privileged", help="All rights inside the VM; none outside.")] = False,
    security_opt: Annotated[
        Texts | None, typer.Option(metavar="OPT", help="no-new-privileges, seccomp=FILE, systempaths=unconfined.")
    ] = None,
    ulimit: Annotated[Texts | None, typer.Option(metavar="NAME=SOFT[:HARD]", help="Resource limit.")] = None,
    sysctl: Annotated[Texts | None, typer.Option(metavar="K=V", help="Kernel parameter.")] = None,
    shm_size: Annotated[str, typer.Option(metavar="SIZE", help="Size of /dev/shm; default 64m.")] = "",
    entrypoint: Annotated[str | None, typer.Option(metavar="CMD", help="Replace the image's entry point.")] = None,
    net: Annotated[
        str,
        typer.Option(
            "--net",
            "--network",
            metavar="none|bridge|NAME",
            envvar="KATAPOD_NETWORK",
            help="Network; default: bridge where the host can have it.",
        ),
    ] = "",
    publish: Annotated[
        Texts | None,
        typer.Option("-p", "--publish", metavar="[IP:]HOST:CONTAINER[/udp]", help="Let a host port lead inside."),
    ] = None,
    dns: Annotated[Texts | None, typer.Option(metavar="IP", help="DNS server; default: the host's.")] = None,
    add_host: Annotated[
        Texts | None, typer.Option(metavar="NAME:IP", help="Line of /etc/hosts; IP may be host-gateway.")
    ] = None,
    ip: Annotated[str, typer.Option("--ip", metavar="IP", help="Address in the network.")] = "",
    mac_address: Annotated[str, typer.Option(metavar="MAC", help="MAC address in the network.")] = "",
    hostname: Annotated[str, typer.Option("-h", "--hostname", metavar="NAME", help="Host name inside.")] = "",
    label: Annotated[Texts | None, typer.Option("-l", "--label", metavar="K=V", help="Label of the container.")] = None,
    stop_signal: Annotated[str, typer.Option(metavar="SIGNAL", help="Signal that asks the container to end.")] = "",
    accel: Annotated[
        str, typer.Option(metavar="auto|kvm|tcg", help="Accelerator; auto uses KVM where guests boot under it.")
    ] = "",
    rootfs: Annotated[str, typer.Option(metavar="DIR", help="Use a directory as image; it is not changed.")] = "",
    bundle: Annotated[str, typer.Option(metavar="DIR", help="Run an OCI bundle as it is.")] = "",
) -> int:
    """Run a command in a container in a virtual machine of its own.

    The exit status is the command's; 125: Katapod failed, 126: the command cannot be executed, 127: it was not found,
    137: it was killed, by its memory limit for example.
    """
    with span("load the runtime"):
        from katapod.cli.owner import RunRequest, run_attached, run_detached
        from katapod.host.own_mounts import leave_host_mounts
        from katapod.plan.container_spec import DEFAULT_SHM_BYTES, ContainerOptions

        is_loaded()
    need_root("run")
    image, command = _image_and_command(words or [], rootfs, bundle)
    for word in command:
        need_text("COMMAND", word)
    if tty and not detach and interactive and not os.isatty(0):
        raise UsageError("cannot use -t with -i: standard input is not a terminal", hint="leave out -t")
    if detach and interactive:
        raise UsageError("cannot use -i with -d: nobody would write to the container's standard input")
    if accel not in ("", "auto", "kvm", "tcg"):
        raise UsageError(f"cannot use --accel {accel!r}: it is none of auto, kvm, tcg")
    container_id = parse_container_name(name or short_id(new_id()))
    security = _security(security_opt or [])
    options = ContainerOptions(
        args=tuple(command),
        entrypoint=entrypoint,
        env=(*_env_files(env_file or []), *parse_env(env or [], os.environ)),
        cwd=parse_workdir(workdir) if workdir else "",
        user=parse_user(user) if user else None,
        groups=tuple(parse_group(item) for item in group_add or []),
        hostname=parse_hostname(hostname) if hostname else container_id[:63],
        tty=tty,
        console_size=_terminal_size() if tty else None,
        memory_bytes=parse_memory(memory) if memory else None,
        cpus=parse_cpus(cpus) if cpus else None,
        pids_limit=parse_pids_limit(pids_limit) if pids_limit else None,
        read_only=read_only,
        cap_add=tuple(parse_cap(item, "--cap-add") for item in cap_add or []),
        cap_drop=tuple(parse_cap(item, "--cap-drop") for item in cap_drop or []),
        volumes=tuple(parse_volume(item, os.getcwd()) for item in volume or []),
        tmpfs=tuple(parse_tmpfs(item) for item in tmpfs or []),
        # 0 is the default, as in Docker; a tmpfs would take it for no limit
        shm_bytes=(parse_size(shm_size) if shm_size else 0) or DEFAULT_SHM_BYTES,
        ulimits=tuple(parse_ulimit(item) for item in ulimit or []),
        sysctls=dict(parse_sysctl(item) for item in sysctl or []),
        privileged=privileged,
        no_new_privileges=security.no_new_privileges,
        seccomp=security.seccomp,
        system_paths=security.system_paths,
    )
    if bundle:
        _refuse_with_bundle(options, container_id, entrypoint)
    request = RunRequest(
        container_id=container_id,
        image=image,
        rootfs=Path(rootfs).resolve() if rootfs else None,
        bundle=Path(bundle).resolve() if bundle else None,
        options=options,
        remove=remove,
        interactive=interactive,
        accel=accel,
        labels=dict(parse_label(item) for item in label or []),
        stop_signal=parse_signal(stop_signal, "--stop-signal") if stop_signal else None,
        network=NetworkRequest(
            name=parse_network(net) if net else "",
            ports=tuple(port for item in publish or [] for port in parse_publish(item)),
            dns=tuple(parse_dns(item) for item in dns or []),
            hosts=tuple(parse_add_host(item) for item in add_host or []),
            ip=parse_ip(ip) if ip else "",
            mac=parse_mac(mac_address) if mac_address else "",
        ),
    )
    settings: Globals = context.obj
    if settings.keep_run is not None:
        settings.keep_run(settings, request, detach)
        return 0
    if detach:
        return run_detached(settings, request)
    leave_host_mounts()
    return asyncio.run(run_attached(settings, request))


def _image_and_command(words: Texts, rootfs: str, bundle: str) -> tuple[str, Texts]:
    if rootfs and bundle:
        raise UsageError("cannot use --rootfs and --bundle together")
    if bundle:
        if words:
            raise UsageError(f"cannot run {words[0]!r} in a bundle: its command is in its config.json")
        return "", []
    if rootfs:
        return "", words
    if not words:
        raise UsageError("cannot run: no image given", hint="for example: kata-runtime run --rm busybox uname -r")
    return words[0], words[1:]


def _env_files(paths: Texts) -> tuple[str, ...]:
    found: list[str] = []
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as exc:
            raise UsageError(f"cannot read --env-file {path}: {exc.strerror}") from exc
        except UnicodeDecodeError as exc:
            line = exc.object[: exc.start].count(b"\n") + 1
            raise UsageError(f"cannot read --env-file {path}: line {line} has bytes that are no UTF-8") from exc
        found.extend(parse_env_file(text, os.environ, path))
    return tuple(found)


class _Security(NamedTuple):
    no_new_privileges: bool = False
    seccomp: "SeccompProfile | None" = None
    system_paths: bool = False


def _security(words: Texts) -> _Security:
    found = _Security()
    for word in words:
        key, _, value = word.replace(":", "=", 1).partition("=") if "=" not in word else word.partition("=")
        if key == "no-new-privileges" and value in ("", "true", "false"):
            found = found._replace(no_new_privileges=value != "false")
        elif word in ("seccomp=unconfined", "seccomp:unconfined", "apparmor=unconfined", "label=disable"):
            continue  # as it is already: the VM is the wall
        elif word == "systempaths=unconfined":
            found = found._replace(system_paths=True)
        elif key == "seccomp":
            found = found._replace(seccomp=_read_seccomp(value))
        else:
            raise UsageError(
                f"cannot use --security-opt {word!r}: it is not known",
                hint="no-new-privileges, seccomp=FILE, seccomp=unconfined and systempaths=unconfined are",
            )
    return found


def _read_seccomp(path: str) -> "SeccompProfile":
    from katapod.model.seccomp_profile import parse_seccomp_profile

    try:
        return parse_seccomp_profile(Path(path).read_bytes(), path)
    except OSError as exc:
        raise UsageError(f"cannot read the seccomp profile {path}: {exc.strerror}") from exc


def _refuse_with_bundle(options: "ContainerOptions", container_id: str, entrypoint: str | None) -> None:
    """A bundle runs as it is: what its config.json decides cannot be given by flags too."""
    import msgspec

    from katapod.plan.container_spec import ContainerOptions

    plain = ContainerOptions(hostname=container_id[:63], tty=options.tty, console_size=options.console_size)
    for field in msgspec.structs.fields(ContainerOptions):
        if getattr(options, field.name) != getattr(plain, field.name):
            raise UsageError(
                f"cannot change {field.name} of a bundle by a flag: --bundle runs it as it is",
                hint="change its config.json",
            )


def _terminal_size() -> "oci.Box | None":
    from katapod.model.oci import Box

    for fd in (0, 1, 2):
        if os.isatty(fd):
            size = os.get_terminal_size(fd)
            return Box(height=size.lines, width=size.columns)
    print("kata-runtime: warning: there is no terminal here to take a size from", file=sys.stderr)
    return None
