"""From the command line of `run` to what the supervisor is asked for."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct

from katapod.cli.env_files import env_files, text_of
from katapod.model.errors import UsageError
from katapod.model.flags import (
    check_swap,
    parse_accelerator,
    parse_cap,
    parse_cpus,
    parse_env,
    parse_group,
    parse_hostname,
    parse_label,
    parse_memory,
    parse_pids_limit,
    parse_signal,
    parse_size,
    parse_stop_timeout,
    parse_sysctl,
    parse_ulimit,
    parse_user,
    parse_workdir,
)
from katapod.model.ids import ContainerId, name_or_new
from katapod.model.mount_flags import (
    NamedVolume,
    TmpfsMount,
    Volume,
    parse_device,
    parse_mount,
    parse_tmpfs,
    parse_volume,
)
from katapod.model.net_flags import (
    NetworkRequest,
    parse_add_host,
    parse_dns,
    parse_dns_option,
    parse_dns_search,
    parse_expose,
    parse_ip,
    parse_mac,
    parse_network,
    parse_publish,
)
from katapod.model.record import DEFAULT_STOP_TIMEOUT_S
from katapod.model.run_flags import (
    RestartPolicy,
    check_platform,
    parse_attach,
    parse_cpu_list,
    parse_cpu_quota,
    parse_log,
    parse_oom_score_adj,
    parse_pull,
    parse_restart,
    parse_umask,
)
from katapod.model.text import need_text

if TYPE_CHECKING:
    from katapod.model import oci
    from katapod.model.seccomp_profile import SeccompProfile
    from katapod.plan.container_spec import ContainerOptions
    from katapod.supervisor.run_request import ImagePolicy, RunRequest

__all__ = ["RunFlags", "run_request"]

Texts = tuple[str, ...]


class RunFlags(Struct, frozen=True):
    """The command line, as click has read it: a field for each of RUN_OPTIONS that works. Not given: "", (), False."""

    words: Texts
    remove: bool
    interactive: bool
    tty: bool
    detach: bool
    name: str
    replace: bool
    attach: Texts
    cidfile: str
    env: Texts
    env_file: Texts
    env_host: bool
    workdir: str
    user: str
    group_add: Texts
    umask: str
    init: bool
    volume: Texts
    mount: Texts
    device: Texts
    tmpfs: Texts
    memory: str
    memory_reservation: str
    memory_swap: str
    cpus: str
    cpu_quota: str
    cpu_period: str
    cpuset_cpus: str
    oom_score_adj: str
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
    publish_all: bool
    expose: Texts
    dns: Texts
    dns_search: Texts
    dns_option: Texts
    add_host: Texts
    no_hosts: bool
    ip: str
    mac_address: str
    hostname: str
    domainname: str
    label: Texts
    label_file: Texts
    annotation: Texts
    stop_signal: str
    stop_timeout: str
    restart: str
    pull: str
    quiet: bool
    platform: str
    authfile: str
    tls_verify: bool | None
    rmi: bool
    log_driver: str
    log_opt: Texts
    sig_proxy: bool
    no_healthcheck: bool
    disable_content_trust: bool
    accel: str
    rootfs: str
    bundle: str


def run_request(flags: RunFlags, *, later: bool = False) -> "RunRequest":
    """`later`: it is created now, and started at some other time. Raises UsageError for what makes no sense."""
    from katapod.supervisor.run_request import RunRequest

    image, command = _image_and_command(flags)
    for word in command:
        need_text("COMMAND", word)
    if flags.tty and not (flags.detach or later) and flags.interactive and not os.isatty(0):
        raise UsageError("cannot use -t with -i: standard input is not a terminal", hint="omit -t")
    if flags.detach and flags.interactive:
        raise UsageError("cannot use -i with -d: a container in the background has no standard input")
    _check_meant(flags)
    container_id = name_or_new(flags.name)
    options = _container_options(flags, command, container_id, later=later)
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
        labels=_labels(flags),
        stop_signal=parse_signal(flags.stop_signal, "--stop-signal") if flags.stop_signal else None,
        network=_network(flags),
        image_policy=_image_policy(flags),
        publish_all=flags.publish_all,
        exposed=tuple(port for item in flags.expose for port in parse_expose(item)),
        cpus_allowed=parse_cpu_list(flags.cpuset_cpus) if flags.cpuset_cpus else frozenset(),
        cid_file=_cid_file(flags.cidfile) if flags.cidfile else None,
        replace=flags.replace,
        remove_image=flags.rmi,
        attach=parse_attach(flags.attach),
        stop_timeout_s=parse_stop_timeout(flags.stop_timeout) if flags.stop_timeout else DEFAULT_STOP_TIMEOUT_S,
        log=parse_log(flags.log_driver, flags.log_opt),
        restart=_restart(flags),
    )


def _check_meant(flags: RunFlags) -> None:
    """Raises UsageError for what goes together with nothing else, or cannot be had in that way."""
    if flags.platform:
        check_platform(flags.platform)
    if not flags.sig_proxy:
        raise UsageError(
            "cannot use --sig-proxy=false: the process in the foreground holds the container, and ends with it",
            hint="run -d, and kata-runtime logs -f NAME",
        )
    if flags.replace and not flags.name:
        raise UsageError("cannot use --replace: it needs --name")
    if flags.rmi and not flags.remove:
        raise UsageError("cannot use --rmi: the container that stays uses the image", hint="add --rm")
    if flags.rmi and (flags.rootfs or flags.bundle):
        raise UsageError("cannot use --rmi: there is no image to remove")


def _restart(flags: RunFlags) -> RestartPolicy:
    policy = parse_restart(flags.restart) if flags.restart else RestartPolicy()
    if policy.name != "no" and flags.remove:
        raise UsageError(f"cannot use --restart {policy} with --rm: what is removed at its end is not started again")
    return policy


def _labels(flags: RunFlags) -> dict[str, str]:
    """Those of the command line last: they win."""
    lines = [line.strip() for path in flags.label_file for line in text_of("--label-file", path).splitlines()]
    given = [line for line in lines if line and not line.startswith("#")]
    return dict(parse_label(item) for item in (*given, *flags.label))


def _image_policy(flags: RunFlags) -> "ImagePolicy":
    from katapod.supervisor.run_request import ImagePolicy

    return ImagePolicy(
        pull=parse_pull(flags.pull) if flags.pull else "missing",
        quiet=flags.quiet,
        tls_verify=flags.tls_verify,
        authfile=Path(flags.authfile).absolute() if flags.authfile else None,
    )


def _cid_file(text: str) -> Path:
    path = Path(text).absolute()
    if path.exists():
        raise UsageError(f"cannot write --cidfile {text}: it is there already", hint="remove it, or name another")
    return path


def _container_options(
    flags: RunFlags, command: Texts, container_id: ContainerId, *, later: bool
) -> "ContainerOptions":
    from katapod.host.init_program import find_init_program
    from katapod.plan.container_spec import DEFAULT_SHM_BYTES, ContainerOptions

    security = _security(flags.security_opt)
    mounts = _mounts(flags)
    cpus, period_us = _cpus(flags)
    memory = parse_memory(flags.memory) if flags.memory else None
    check_swap(flags.memory_swap, memory)
    return ContainerOptions(
        args=command,
        entrypoint=flags.entrypoint,
        env=(
            *(parse_env(os.environ, os.environ) if flags.env_host else ()),
            *env_files(flags.env_file),
            *parse_env(flags.env, os.environ),
        ),
        cwd=parse_workdir(flags.workdir) if flags.workdir else "",
        user=parse_user(flags.user) if flags.user else None,
        groups=tuple(parse_group(item) for item in flags.group_add),
        hostname=parse_hostname(flags.hostname) if flags.hostname else container_id[:63],
        tty=flags.tty,
        console_size=_terminal_size() if flags.tty and not later else None,
        memory_bytes=memory,
        memory_reservation_bytes=_reservation(flags.memory_reservation, memory),
        cpus=cpus,
        cpu_period_us=period_us,
        oom_score_adj=parse_oom_score_adj(flags.oom_score_adj) if flags.oom_score_adj else None,
        umask=parse_umask(flags.umask) if flags.umask else None,
        domainname=parse_hostname(flags.domainname, "--domainname") if flags.domainname else "",
        pids_limit=parse_pids_limit(flags.pids_limit) if flags.pids_limit else None,
        read_only=flags.read_only,
        cap_add=tuple(parse_cap(item, "--cap-add") for item in flags.cap_add),
        cap_drop=tuple(parse_cap(item, "--cap-drop") for item in flags.cap_drop),
        volumes=tuple(each for each in mounts if isinstance(each, Volume)),
        named_volumes=tuple(each for each in mounts if isinstance(each, NamedVolume)),
        tmpfs=tuple(each for each in mounts if isinstance(each, TmpfsMount)),
        devices=tuple(parse_device(item) for item in flags.device),
        init_program=find_init_program() if flags.init else "",
        annotations=dict(parse_label(item, "--annotation") for item in flags.annotation),
        # 0 is the default, as in Docker; a tmpfs would take it for no limit
        shm_bytes=(parse_size(flags.shm_size) if flags.shm_size else 0) or DEFAULT_SHM_BYTES,
        ulimits=tuple(parse_ulimit(item) for item in flags.ulimit),
        sysctls=dict(parse_sysctl(item) for item in flags.sysctl),
        privileged=flags.privileged,
        no_new_privileges=security.no_new_privileges,
        seccomp=security.seccomp,
        system_paths=security.system_paths,
    )


def _mounts(flags: RunFlags) -> list[Volume | NamedVolume | TmpfsMount]:
    cwd = os.getcwd()
    return [
        *(parse_volume(item, cwd) for item in flags.volume),
        *(parse_mount(item, cwd) for item in flags.mount),
        *(parse_tmpfs(item) for item in flags.tmpfs),
    ]


def _cpus(flags: RunFlags) -> tuple[float | None, int]:
    """(CPUs, period in microseconds). Raises UsageError."""
    from katapod.plan.container_spec import CPU_PERIOD_US

    if flags.cpus and (flags.cpu_quota or flags.cpu_period):
        raise UsageError("cannot use --cpus together with --cpu-quota or --cpu-period: they say the same")
    if flags.cpus:
        return parse_cpus(flags.cpus), CPU_PERIOD_US
    return parse_cpu_quota(flags.cpu_quota, flags.cpu_period, CPU_PERIOD_US)


def _reservation(text: str, memory: int | None) -> int | None:
    found = parse_memory(text, "--memory-reservation") if text else None
    if found is not None and memory is not None and found > memory:
        raise UsageError(f"cannot use --memory-reservation {text}: it is more than the limit, -m")
    return found


def _network(flags: RunFlags) -> NetworkRequest:
    return NetworkRequest(
        name=parse_network(flags.net) if flags.net else "",
        ports=tuple(port for item in flags.publish for port in parse_publish(item)),
        dns=tuple(parse_dns(item) for item in flags.dns),
        hosts=tuple(parse_add_host(item) for item in flags.add_host),
        ip=parse_ip(flags.ip) if flags.ip else "",
        mac=parse_mac(flags.mac_address) if flags.mac_address else "",
        search=tuple(parse_dns_search(item) for item in flags.dns_search),
        options=tuple(parse_dns_option(item) for item in flags.dns_option),
        no_hosts=flags.no_hosts,
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
