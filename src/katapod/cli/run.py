"""`kata-runtime run`: the flags, in the words that users of `docker run` know."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from msgspec import Struct

from katapod.cli import is_loaded
from katapod.cli.command import HOST_PATH, argument, flag, option, repeatable, verb
from katapod.cli.handed_over import read_exec
from katapod.cli.settings import Globals, need_root
from katapod.host.trace import span
from katapod.model.errors import UsageError
from katapod.model.flags import (
    parse_accelerator,
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
    parse_ulimit,
    parse_user,
    parse_workdir,
)
from katapod.model.ids import ContainerId, name_or_new
from katapod.model.mount_flags import parse_tmpfs, parse_volume
from katapod.model.net_flags import (
    NetworkRequest,
    parse_add_host,
    parse_dns,
    parse_ip,
    parse_mac,
    parse_network,
    parse_publish,
)
from katapod.model.text import need_text

if TYPE_CHECKING:
    from katapod.model import oci
    from katapod.model.seccomp_profile import SeccompProfile
    from katapod.plan.container_spec import ContainerOptions
    from katapod.supervisor.run_request import RunRequest

__all__ = ["run"]

Texts = tuple[str, ...]


class RunFlags(Struct, frozen=True):
    """The command line, as click has read it: a field for each parameter of run(). Not given: "", (), False."""

    words: Texts
    remove: bool
    interactive: bool
    tty: bool
    detach: bool
    name: str
    env: Texts
    env_file: Texts
    workdir: str
    user: str
    group_add: Texts
    volume: Texts
    tmpfs: Texts
    memory: str
    cpus: str
    pids_limit: str
    read_only: bool
    cap_add: Texts
    cap_drop: Texts
    privileged: bool
    security_opt: Texts
    ulimit: Texts
    sysctl: Texts
    shm_size: str
    entrypoint: str | None  # "" takes the image's away
    net: str
    publish: Texts
    dns: Texts
    add_host: Texts
    ip: str
    mac_address: str
    hostname: str
    label: Texts
    stop_signal: str
    accel: str
    rootfs: str
    bundle: str


@verb("run", context_settings={"allow_interspersed_args": False, "help_option_names": ["--help"]})
@argument(
    "words",
    nargs=-1,
    metavar="IMAGE [COMMAND...]",
    type=HOST_PATH,
    help="A stored image, or oci:PATH, oci-archive:FILE, docker-archive:FILE, docker://HOST/NAME:TAG. "
    "Not given with --rootfs or --bundle.",
)
@flag("--rm", "remove", help="Remove the container when it exits.")
@flag("-i", "--interactive", help="Keep standard input open.")
@flag("-t", "--tty", help="Allocate a terminal for the container.")
@flag("-d", "--detach", help="Run in the background and print the name.")
@option("--name", metavar="TEXT", help="Name of the container; default: a random ID.")
@repeatable("-e", "--env", metavar="K[=V]", help="Set an environment variable.")
@repeatable("--env-file", metavar="FILE", type=HOST_PATH, help="Read environment variables from a file.")
@option("-w", "--workdir", metavar="DIR", help="Working directory.")
@option("-u", "--user", metavar="USER[:GROUP]", help="User name or ID.")
@repeatable("--group-add", metavar="GROUP", help="Add the user to another group.")
@repeatable("-v", "--volume", metavar="SRC:DST[:ro]", type=HOST_PATH, help="Mount a host file or directory.")
@repeatable("--tmpfs", metavar="DST[:OPTS]", help="Mount a tmpfs.")
@option("-m", "--memory", metavar="SIZE", help="Memory limit (512m, 2g); sizes the VM too.")
@option("--cpus", metavar="N", help="CPU limit (1.5); sizes the VM too.")
@option("--pids-limit", metavar="N", help="Maximum number of processes.")
@flag("--read-only", help="Read-only root file system.")
@repeatable("--cap-add", metavar="CAP", help="Add a capability, or ALL.")
@repeatable("--cap-drop", metavar="CAP", help="Drop a capability, or ALL.")
@flag("--privileged", help="All privileges inside the VM; none on the host.")
@repeatable(
    "--security-opt",
    metavar="OPT",
    type=HOST_PATH,
    help="no-new-privileges, seccomp=FILE, systempaths=unconfined.",
)
@repeatable("--ulimit", metavar="NAME=SOFT[:HARD]", help="Set a resource limit.")
@repeatable("--sysctl", metavar="K=V", help="Set a kernel parameter.")
@option("--shm-size", metavar="SIZE", help="Size of /dev/shm; default 64m.")
@option("--entrypoint", metavar="CMD", default=None, help="Replace the image's entry point.")
@option(
    "--net",
    "--network",
    "net",
    metavar="none|bridge|NAME",
    envvar="KATAPOD_NETWORK",
    show_envvar=True,
    help="Network; default: bridge where the host supports it.",
)
@repeatable("-p", "--publish", metavar="[IP:]HOST:CONTAINER[/udp]", help="Forward a host port to the container.")
@repeatable("--dns", metavar="IP", help="DNS server; default: the host's.")
@repeatable("--add-host", metavar="NAME:IP", help="Add a line to /etc/hosts; IP may be host-gateway.")
@option("--ip", metavar="IP", help="IP address in the network.")
@option("--mac-address", metavar="MAC", help="MAC address in the network.")
@option("-h", "--hostname", metavar="NAME", help="Host name of the container.")
@repeatable("-l", "--label", metavar="K=V", help="Set a label on the container.")
@option("--stop-signal", metavar="SIGNAL", help="Signal that asks the container to stop.")
@option(
    "--accel", metavar="auto|kvm|uml|tcg", help="Accelerator; auto: the first that works and has what is asked for."
)
@option("--rootfs", metavar="DIR", type=HOST_PATH, help="Use a directory as the image; it is not changed.")
@option("--bundle", metavar="DIR", type=HOST_PATH, help="Run an OCI bundle unchanged.")
@click.pass_obj
def run(settings: Globals, /, **parameters: Any) -> int:
    """Run a command in a new container, in a virtual machine of its own.

    The exit status is that of the command, or 125 if Katapod failed, 126 if the command cannot be executed, 127 if it
    was not found, and 137 if it was killed, for example because of its memory limit.
    """
    flags = RunFlags(**parameters)
    with span("load the runtime"):
        import asyncio

        from katapod.host.own_mounts import leave_host_mounts
        from katapod.supervisor.run import run_attached, run_detached

        is_loaded()
    need_root("run")
    request = _request(flags)
    context = settings.run_context(read_exec)
    if settings.keep_run is not None:
        settings.keep_run(context, request, flags.detach)
        return 0
    if flags.detach:
        status = run_detached(context, request)
        if status == 0:
            print(request.container_id)
        return status
    leave_host_mounts()
    return asyncio.run(run_attached(context, request))


def _request(flags: RunFlags) -> "RunRequest":
    """Raises UsageError for what makes no sense."""
    from katapod.supervisor.run_request import RunRequest

    image, command = _image_and_command(flags)
    for word in command:
        need_text("COMMAND", word)
    if flags.tty and not flags.detach and flags.interactive and not os.isatty(0):
        raise UsageError("cannot use -t with -i: standard input is not a terminal", hint="omit -t")
    if flags.detach and flags.interactive:
        raise UsageError("cannot use -i with -d: a container in the background has no standard input")
    container_id = name_or_new(flags.name)
    options = _container_options(flags, command, container_id)
    if flags.bundle:
        _refuse_with_bundle(options, container_id)
    return RunRequest(
        container_id=container_id,
        image=image,
        rootfs=Path(flags.rootfs).resolve() if flags.rootfs else None,
        bundle=Path(flags.bundle).resolve() if flags.bundle else None,
        options=options,
        remove=flags.remove,
        interactive=flags.interactive,
        accel=parse_accelerator(flags.accel),
        labels=dict(parse_label(item) for item in flags.label),
        stop_signal=parse_signal(flags.stop_signal, "--stop-signal") if flags.stop_signal else None,
        network=_network(flags),
    )


def _container_options(flags: RunFlags, command: Texts, container_id: ContainerId) -> "ContainerOptions":
    from katapod.plan.container_spec import DEFAULT_SHM_BYTES, ContainerOptions

    security = _security(flags.security_opt)
    return ContainerOptions(
        args=command,
        entrypoint=flags.entrypoint,
        env=(*_env_files(flags.env_file), *parse_env(flags.env, os.environ)),
        cwd=parse_workdir(flags.workdir) if flags.workdir else "",
        user=parse_user(flags.user) if flags.user else None,
        groups=tuple(parse_group(item) for item in flags.group_add),
        hostname=parse_hostname(flags.hostname) if flags.hostname else container_id[:63],
        tty=flags.tty,
        console_size=_terminal_size() if flags.tty else None,
        memory_bytes=parse_memory(flags.memory) if flags.memory else None,
        cpus=parse_cpus(flags.cpus) if flags.cpus else None,
        pids_limit=parse_pids_limit(flags.pids_limit) if flags.pids_limit else None,
        read_only=flags.read_only,
        cap_add=tuple(parse_cap(item, "--cap-add") for item in flags.cap_add),
        cap_drop=tuple(parse_cap(item, "--cap-drop") for item in flags.cap_drop),
        volumes=tuple(parse_volume(item, os.getcwd()) for item in flags.volume),
        tmpfs=tuple(parse_tmpfs(item) for item in flags.tmpfs),
        # 0 is the default, as in Docker; a tmpfs would take it for no limit
        shm_bytes=(parse_size(flags.shm_size) if flags.shm_size else 0) or DEFAULT_SHM_BYTES,
        ulimits=tuple(parse_ulimit(item) for item in flags.ulimit),
        sysctls=dict(parse_sysctl(item) for item in flags.sysctl),
        privileged=flags.privileged,
        no_new_privileges=security.no_new_privileges,
        seccomp=security.seccomp,
        system_paths=security.system_paths,
    )


def _network(flags: RunFlags) -> NetworkRequest:
    return NetworkRequest(
        name=parse_network(flags.net) if flags.net else "",
        ports=tuple(port for item in flags.publish for port in parse_publish(item)),
        dns=tuple(parse_dns(item) for item in flags.dns),
        hosts=tuple(parse_add_host(item) for item in flags.add_host),
        ip=parse_ip(flags.ip) if flags.ip else "",
        mac=parse_mac(flags.mac_address) if flags.mac_address else "",
    )


def _image_and_command(flags: RunFlags) -> tuple[str, Texts]:
    words = flags.words
    if flags.rootfs and flags.bundle:
        raise UsageError("cannot use --rootfs and --bundle together")
    if flags.bundle:
        if words:
            raise UsageError(f"cannot run {words[0]!r} in a bundle: its command is in its config.json")
        return "", ()
    if flags.rootfs:
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
            raise UsageError(f"cannot read --env-file {path}: line {line} is not valid UTF-8") from exc
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
                f"cannot use --security-opt {word!r}: it is unknown",
                hint="known are no-new-privileges, seccomp=FILE, seccomp=unconfined and systempaths=unconfined",
            )
    return found


def _read_seccomp(path: str) -> "SeccompProfile":
    from katapod.model.seccomp_profile import parse_seccomp_profile

    try:
        return parse_seccomp_profile(Path(path).read_bytes(), path)
    except OSError as exc:
        raise UsageError(f"cannot read the seccomp profile {path}: {exc.strerror}") from exc


def _refuse_with_bundle(options: "ContainerOptions", container_id: ContainerId) -> None:
    """A bundle runs as it is: what its config.json decides cannot be given by flags too."""
    import msgspec

    from katapod.plan.container_spec import ContainerOptions

    plain = ContainerOptions(hostname=container_id[:63], tty=options.tty, console_size=options.console_size)
    for field in msgspec.structs.fields(ContainerOptions):
        if getattr(options, field.name) != getattr(plain, field.name):
            raise UsageError(
                f"cannot change {field.name} of a bundle by a flag: --bundle runs it unchanged",
                hint="change its config.json",
            )


def _terminal_size() -> "oci.Box | None":
    from katapod.model.oci import Box

    for fd in (0, 1, 2):
        if os.isatty(fd):
            size = os.get_terminal_size(fd)
            return Box(height=size.lines, width=size.columns)
    print("kata-runtime: warning: there is no terminal to take the size from", file=sys.stderr)
    return None
