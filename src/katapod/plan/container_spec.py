"""From an image's defaults and a caller's options to an OCI spec, by the rules that Docker has made usual.

Pure. The spec describes the container as its user sees it, with paths of the host; guest_spec.py turns
it into what the guest gets.
"""

from collections.abc import Iterable

from msgspec import Struct, field
from msgspec.structs import replace

from katapod.model import oci
from katapod.model.errors import UsageError
from katapod.model.flags import ALL_CAPABILITIES, UserName, is_number, parse_user
from katapod.model.mount_flags import DeviceRequest, NamedVolume, TmpfsMount, Volume
from katapod.model.seccomp_profile import SeccompProfile
from katapod.plan.seccomp import GuestKernel, plan_seccomp
from katapod.version import OCI_VERSION

__all__ = [
    "CPU_PERIOD_US",
    "DEFAULT_CAPABILITIES",
    "DEFAULT_PATH",
    "ContainerOptions",
    "ProcessDefaults",
    "effective_user",
    "etc_files",
    "numeric_user",
    "plan_container_spec",
    "plan_exec_process",
    "with_etc_files",
]

"""What crun 1.8 (Debian 12) implements."""

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_SHM_BYTES = 64 << 20
CPU_PERIOD_US = 100_000
"""The kernel's own default period of the CPU controller."""

INIT_PATH = "/dev/init"
"""Where a container with an init program has it: its /dev is a tmpfs, so that no image needs a file to mount it on."""

DEFAULT_CAPABILITIES = tuple(
    f"CAP_{name}"
    for name in (
        *("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP"),
        *("SETPCAP", "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
    )
)
"""Docker's fourteen."""

_MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
_READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


class ProcessDefaults(Struct, frozen=True, kw_only=True):
    """What an image says about its process (the `config` object of an OCI image)."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    cwd: str = ""
    user: str = ""
    stop_signal: str = ""
    labels: dict[str, str] = field(default_factory=dict)


class ContainerOptions(Struct, frozen=True, kw_only=True):
    """What the caller asks for; the flags of `run` after parsing.

    `entrypoint`: None keeps the image's, "" removes it. `user`: None takes the image's. `groups`: further ones of
    the user, by name or number.
    `named_volumes` have become volumes by the time that a spec is planned. `init_program`: a static one of the host,
    the container's first process, which runs the command; empty: the command is that.
    `seccomp`: None means no filter. `system_paths`: nothing of /proc and /sys is masked or made read-only.
    """

    args: tuple[str, ...] = ()
    entrypoint: str | None = None
    env: tuple[str, ...] = ()
    cwd: str = ""
    user: UserName | None = None
    groups: tuple[str, ...] = ()
    hostname: str = ""
    tty: bool = False
    console_size: oci.Box | None = None
    memory_bytes: int | None = None
    cpus: float | None = None
    cpu_period_us: int = CPU_PERIOD_US
    memory_reservation_bytes: int | None = None
    oom_score_adj: int | None = None
    umask: int | None = None
    domainname: str = ""
    pids_limit: int | None = None
    read_only: bool = False
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    volumes: tuple[Volume, ...] = ()
    named_volumes: tuple[NamedVolume, ...] = ()
    devices: tuple[DeviceRequest, ...] = ()
    init_program: str = ""
    tmpfs: tuple[TmpfsMount, ...] = ()
    shm_bytes: int = DEFAULT_SHM_BYTES
    ulimits: tuple[oci.Rlimit, ...] = ()
    sysctls: dict[str, str] = field(default_factory=dict)
    privileged: bool = False
    no_new_privileges: bool = False
    seccomp: SeccompProfile | None = None
    system_paths: bool = False
    annotations: dict[str, str] = field(default_factory=dict)
    cgroups_path: str = ""


def plan_container_spec(
    image: ProcessDefaults, options: ContainerOptions, root_path: str, kernel: GuestKernel | None = None
) -> oci.Spec:
    """Plan one container with the root file system at `root_path`, an absolute path of the host.

    There is no network namespace: a container shares that of its sandbox. A seccomp profile needs to know the
    guest's `kernel`. Raises UsageError if there is no command, a working directory is not absolute, or two mounts
    have one destination; SpecError as plan_seccomp.
    """
    seccomp = None
    if options.seccomp is not None:
        assert kernel is not None
        seccomp = plan_seccomp(options.seccomp, _capabilities(options), kernel)
    all_paths = options.privileged or options.system_paths
    return oci.Spec(
        oci_version=OCI_VERSION,
        process=_process(image, options),
        root=oci.Root(path=root_path, readonly=options.read_only),
        hostname=options.hostname,
        domainname=options.domainname,
        mounts=_mounts(options),
        annotations=dict(options.annotations),
        linux=oci.Linux(
            sysctl=dict(options.sysctls),
            resources=_resources(options),
            cgroups_path=options.cgroups_path,
            namespaces=tuple(oci.Namespace(type=kind) for kind in ("pid", "ipc", "uts", "mount")),
            seccomp=seccomp,
            masked_paths=() if all_paths else _MASKED_PATHS,
            readonly_paths=() if all_paths else _READONLY_PATHS,
        ),
    )


def etc_files(hostname: str) -> dict[str, str]:
    """The files below /etc that say who the container is, by name: without them `localhost` has no address."""
    return {
        "hostname": f"{hostname}\n",
        "hosts": f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n",
    }


def with_etc_files(spec: oci.Spec, directory: str, names: Iterable[str] = ("hostname", "hosts")) -> oci.Spec:
    """Mount the files `names` of /etc, which lie in `directory` on the host, where the caller mounts nothing else."""
    taken = {mount.destination for mount in spec.mounts}
    own = tuple(
        oci.Mount(destination=f"/etc/{name}", type="bind", source=f"{directory}/{name}", options=("rbind", "rw"))
        for name in names
        if not taken & {"/etc", f"/etc/{name}"}
    )
    return replace(spec, mounts=(*spec.mounts, *own))


def plan_exec_process(
    spec: oci.Spec,
    args: tuple[str, ...],
    *,
    env: tuple[str, ...] = (),
    cwd: str = "",
    user: oci.User | None = None,
    tty: bool = False,
    console_size: oci.Box | None = None,
    privileged: bool = False,
) -> oci.Process:
    """Plan a further process in the container of `spec`: its environment, directory, user and privileges
    unless the caller says otherwise. Raises UsageError."""
    if not args or not args[0]:
        raise UsageError("cannot run a process: no command given", hint="for example: exec NAME sh")
    if cwd and not cwd.startswith("/"):
        raise UsageError(f"cannot use {cwd!r} as the working directory: it is not an absolute path")
    first = spec.process
    user = user or first.user
    bounding = ALL_CAPABILITIES if privileged else first.capabilities.bounding if first.capabilities else ()
    return oci.Process(
        terminal=tty,
        console_size=console_size if tty else None,
        user=user,
        args=args,
        env=_merge_env((*(("TERM=xterm",) if tty else ()), *first.env, *env)),
        cwd=cwd or first.cwd,
        capabilities=_capability_sets(bounding, user),
        rlimits=first.rlimits,
        no_new_privileges=first.no_new_privileges and not privileged,
        oom_score_adj=first.oom_score_adj,
    )


def effective_user(image: ProcessDefaults, options: ContainerOptions) -> UserName:
    """The user that the caller names, else the image's, else root.

    Goes to the agent as StringUser: names have numbers only in the container's own files.
    """
    return options.user or parse_user(image.user, "the image's user")


def numeric_user(name: UserName) -> oci.User:
    """As far as the host can know; 0 stands for names until the agent has looked them up."""
    group = name.group or ""
    return oci.User(uid=int(name.user) if is_number(name.user) else 0, gid=int(group) if is_number(group) else 0)


def _process(image: ProcessDefaults, options: ContainerOptions) -> oci.Process:
    # some builders leave a relative one in the image: they mean the root directory, in which they have made it
    cwd = options.cwd or f"/{image.cwd.lstrip('/')}"
    if not cwd.startswith("/"):
        raise UsageError(f"cannot use {cwd!r} as the working directory: it is not an absolute path")
    user = numeric_user(effective_user(image, options))
    if options.umask is not None:
        user = replace(user, umask=options.umask)
    command = _command(image, options)
    return oci.Process(
        terminal=options.tty,
        console_size=options.console_size if options.tty else None,
        user=user,
        args=(INIT_PATH, "--", *command) if options.init_program else command,
        env=_environment(image, options),
        cwd=cwd,
        capabilities=_capability_sets(_capabilities(options), user),
        rlimits=options.ulimits,
        no_new_privileges=options.no_new_privileges,
        oom_score_adj=options.oom_score_adj,
    )


def _command(image: ProcessDefaults, options: ContainerOptions) -> tuple[str, ...]:
    """Arguments of the caller replace the image's cmd; an entrypoint of the caller replaces the image's
    and drops its cmd, which was meant for the other one."""
    if options.entrypoint is None:
        command = (*image.entrypoint, *(options.args or image.cmd))
    else:
        command = (*((options.entrypoint,) if options.entrypoint else ()), *options.args)
    if not command or not command[0]:
        raise UsageError(
            "cannot run the container: no command given and the image has none",
            hint="give one after the image, for example: run IMAGE sh",
        )
    return command


def _environment(image: ProcessDefaults, options: ContainerOptions) -> tuple[str, ...]:
    """Defaults, then the image's, then the caller's; the later one wins."""
    entries = [f"PATH={DEFAULT_PATH}"]
    if options.hostname:
        entries.append(f"HOSTNAME={options.hostname}")
    if options.tty:
        entries.append("TERM=xterm")
    return _merge_env((*entries, *image.env, *options.env))


def _merge_env(entries: Iterable[str]) -> tuple[str, ...]:
    """One entry for each name, the last one, in the order of first appearance. Entries without "=" are
    dropped: an environment cannot hold them."""
    found: dict[str, str] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if equals and name:
            found[name] = value
    return tuple(f"{name}={value}" for name, value in found.items())


def _capabilities(options: ContainerOptions) -> tuple[str, ...]:
    """Docker's rule: "ALL" in one list makes it the base that the other list changes."""
    if options.privileged:
        return ALL_CAPABILITIES
    added, dropped = set(options.cap_add), set(options.cap_drop)
    if "ALL" in dropped:
        kept = set(ALL_CAPABILITIES) if "ALL" in added else added
    elif "ALL" in added:
        kept = set(ALL_CAPABILITIES) - dropped
    else:
        kept = set(DEFAULT_CAPABILITIES) - dropped | added
    return tuple(name for name in ALL_CAPABILITIES if name in kept)


def _capability_sets(names: tuple[str, ...], user: oci.User) -> oci.Capabilities:
    """A user other than root gets them as bounding set only, as execve(2) would leave it."""
    usable = names if user.uid == 0 else ()
    return oci.Capabilities(bounding=names, effective=usable, permitted=usable)


def _resources(options: ContainerOptions) -> oci.Resources:
    """Swap is limited to the memory limit, that is: none. A guest has no swap of its own."""
    limit, reservation = options.memory_bytes, options.memory_reservation_bytes
    limited = limit is not None or reservation is not None
    return oci.Resources(
        devices=(oci.DeviceCgroup(allow=True, access="rwm"),) if options.privileged else _default_devices(),
        memory=oci.Memory(limit=limit, swap=limit, reservation=reservation) if limited else None,
        cpu=oci.Cpu(quota=round(options.cpus * options.cpu_period_us), period=options.cpu_period_us)
        if options.cpus is not None
        else None,
        pids=oci.Pids(limit=options.pids_limit) if options.pids_limit is not None else None,
    )


def _default_devices() -> tuple[oci.DeviceCgroup, ...]:
    """Nodes of any kind may be made; only null, zero, full, random, urandom, tty, console, ptmx and
    pseudo terminals may be opened."""
    opened = ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (136, None))
    return (
        oci.DeviceCgroup(allow=False, access="rwm"),
        oci.DeviceCgroup(allow=True, type="c", access="m"),
        oci.DeviceCgroup(allow=True, type="b", access="m"),
        *(oci.DeviceCgroup(allow=True, type="c", major=a, minor=b, access="rwm") for a, b in opened),
    )


def _mounts(options: ContainerOptions) -> tuple[oci.Mount, ...]:
    """The usual ones, except where the caller mounts something else, then the caller's, parents first."""
    asked = [_volume(volume) for volume in options.volumes]
    if options.init_program:
        asked.append(_volume(Volume(source=options.init_program, destination=INIT_PATH, read_only=True)))
    asked += [
        oci.Mount(destination=one.destination, type="tmpfs", source="tmpfs", options=one.options)
        for one in options.tmpfs
    ]
    taken: set[str] = set()
    for mount in asked:
        if mount.destination in taken:
            raise UsageError(
                f"cannot mount on {mount.destination}: two mounts have this destination",
                hint="give each -v, --mount and --tmpfs a destination of its own",
            )
        taken.add(mount.destination)
    asked.sort(key=lambda mount: mount.destination.count("/"))
    return (*(mount for mount in _default_mounts(options) if mount.destination not in taken), *asked)


def _volume(volume: Volume) -> oci.Mount:
    return oci.Mount(
        destination=volume.destination,
        type="bind",
        source=volume.source,
        options=("rbind", "rprivate", *(("ro", "rro") if volume.read_only else ("rw",))),
    )


def _default_mounts(options: ContainerOptions) -> tuple[oci.Mount, ...]:
    access = "rw" if options.privileged else "ro"
    quiet = ("nosuid", "noexec", "nodev")

    def mount(destination: str, kind: str, *flags: str, source: str = "") -> oci.Mount:
        return oci.Mount(destination=destination, type=kind, source=source or kind, options=flags)

    return (
        mount("/proc", "proc", *quiet),
        mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        mount("/sys", "sysfs", *quiet, access),
        mount("/sys/fs/cgroup", "cgroup", *quiet, "relatime", access),
        mount("/dev/mqueue", "mqueue", *quiet),
        mount("/dev/shm", "tmpfs", *quiet, "mode=1777", f"size={options.shm_bytes}", source="shm"),  # noqa: S108
    )
