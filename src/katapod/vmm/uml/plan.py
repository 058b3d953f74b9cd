"""The command line of a User-mode Linux kernel, planned as data: pure, printable, comparable.

Paths are those that the kernel sees in its jail. Source: the kernel's Documentation/virt/uml and its --help.
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path

from msgspec import Struct

from katapod.host.regset import REGSET
from katapod.model.flavour import UML_ROOT
from katapod.plan.call_filter import CallFilter
from katapod.plan.jail import Access, Bind, JailLimits, JailPlan, Tmpfs
from katapod.vmm.devices import Nic
from katapod.vmm.spec import VmmOptions, VmSpec
from katapod.vmm.uml.balloon_device import BALLOON_ID
from katapod.vmm.uml.console_device import CONSOLE_ID
from katapod.vmm.uml.cpuinfo import CPUINFO
from katapod.vmm.uml.disks import disk_options
from katapod.vmm.uml.nics import nic_option
from katapod.vmm.uml.share_device import SHARE_ID
from katapod.vmm.uml.system_calls import CALLS

__all__ = [
    "BALLOON_SOCKET",
    "CONSOLE_SOCKET",
    "DISK",
    "HASH_TABLES",
    "KERNEL",
    "LIBRARY",
    "MCONSOLE",
    "SHARE_PLACE",
    "SHARE_SOCKET",
    "SOCKETS",
    "WORK",
    "FdSlot",
    "UmlArgument",
    "UmlOptions",
    "UmlPlan",
    "argv0_of",
    "options_of",
    "plan_jail",
    "plan_kernel_params",
    "plan_uml",
    "processes_on",
    "render_uml",
]

KERNEL = Path("/linux")  # in the jail, as all of these
LIBRARY = Path("/libregset.so.1")  # preloaded: host/regset.py
DISK = Path("/disk")  # the guest's root
SOCKETS = Path("/sockets")  # of its virtio devices; read-only
WORK = Path("/tmp")  # a tmpfs that may execute: the guest's memory and mconsole lie there  # noqa: S108
UMID = "vm"
MCONSOLE = WORK / UMID / "mconsole"
TUN = Path("/dev/net/tun")
CONSOLE_SOCKET = "console.sock"
SHARE_SOCKET = "share.sock"
SHARE_PLACE = "virtio-uml.1"  # what the kernel calls the second virtio device of its command line
BALLOON_SOCKET = "balloon.sock"

WORK_BEYOND_MIB = 64  # of the tmpfs, beyond the guest's memory
MEMORY_FILE_BEYOND = 2 << 30  # its file begins with a hole as long as the random offset of the heap: brk(2)
PROCESSES_MAX = 16384  # of the host: one for each of the guest's, and some of the kernel's own
PART_OF_PIDS = 8  # a machine takes one in so many of the host's process ids at most: a few that want all leave some

LOOPS_PER_JIFFY = 30613504  # for udelay() only; measuring them takes a start 0.2 s
HASH_TABLES = {"dhash_entries=": 32, "ihash_entries=": 16, "thash_entries=": 4}  # entries for each MiB of memory
LEFT_OUT = (
    "raid6_select_algo",  # self-tests of a second
    "calibrate_xor_blocks",
    "init_hostfs",  # the guest's way to the host's files
    "harddog_miscdev_init",  # a watchdog that starts a program of the host's
    "ssl_init",  # 64 serial lines, which nobody uses
    *("init_btrfs_fs", "init_xfs_fs", "init_jfs_fs", "init_zswap"),  # plan/guest_modules.py says so too
)


class FdSlot(Enum):
    """Descriptors that the kernel inherits; arguments name the slot, never a number."""

    CONSOLE = "console"  # our end is read into a bounded file


class UmlOptions(VmmOptions, frozen=True):
    """What of a VM only User-mode Linux has."""

    libraries: tuple[Path, ...] = ()  # of the host, that the kernel is linked to
    has_disks: bool = False  # the host can serve them
    processes: int = PROCESSES_MAX  # that its guest may have


DEFAULT_OPTIONS = UmlOptions()


def options_of(vm: VmSpec) -> UmlOptions:
    return vm.options if isinstance(vm.options, UmlOptions) else DEFAULT_OPTIONS


class UmlArgument(Struct, frozen=True):
    """One word; `{fd}` stands for the number of the slot's descriptor."""

    text: str
    slot: FdSlot | None = None


class UmlPlan(Struct, frozen=True):
    """How the kernel is started. `vm_dir` is the host's directory of this VM."""

    program: Path  # of the host, as the next three
    libraries: tuple[Path, ...]
    disk: Path
    vm_dir: Path
    mem_mib: int
    arguments: tuple[UmlArgument, ...]
    processes: int = PROCESSES_MAX  # of the host
    has_balloon: bool = False
    standby: bool = False  # its network comes later
    cgroups: tuple[Path, ...] = ()  # of the host

    @property
    def sockets(self) -> Path:
        """Where the host has what the jail has at SOCKETS."""
        return self.vm_dir / SOCKETS.name

    @property
    def cpuinfo(self) -> Path:
        """What the jail has for its host's /proc/cpuinfo: a file of whoever starts the kernel."""
        return self.vm_dir / "cpuinfo"

    def describe(self) -> str:
        return "\n".join([f"{self.program}", *(f"  {argument.text}" for argument in self.arguments)])


def argv0_of(vm_dir: Path) -> str:
    """The name that the kernel and its helpers show, by which a fresh process finds them. It is no path of a program:
    a guest that reboots makes the kernel execute it, and must only end."""
    return f"linux.uml {vm_dir}"


def plan_uml(vm: VmSpec, *, nics: Sequence[Nic] = ()) -> UmlPlan:
    """The kernel of `vm` with interfaces, a place for a shared directory, and places for disks if the host can serve
    them. Raises VmmRefused for an interface that it cannot name."""
    arguments = [
        UmlArgument(f"mem={vm.mem_mib}M"),
        UmlArgument(f"ubd0r={DISK}"),
        UmlArgument("con=null"),
        UmlArgument("con0=fd:{fd},fd:{fd}", FdSlot.CONSOLE),
        UmlArgument("ssl=null"),
        UmlArgument(f"umid={UMID}"),
        UmlArgument(f"uml_dir={WORK}/"),
        UmlArgument(_virtio(CONSOLE_SOCKET, CONSOLE_ID)),
        UmlArgument(_virtio(SHARE_SOCKET, SHARE_ID)),  # there at the boot, or later: SHARE_PLACE
    ]
    if options_of(vm).has_disks:  # behind DEVICES_BEFORE others
        arguments += [UmlArgument(text) for text in disk_options(SOCKETS)]
    if vm.reports_free_pages:
        arguments.append(UmlArgument(_virtio(BALLOON_SOCKET, BALLOON_ID)))
    arguments += [UmlArgument(nic_option(nic)) for nic in nics]
    arguments += [UmlArgument(text) for text in plan_kernel_params(vm)]
    return UmlPlan(
        program=Path(vm.program),
        libraries=options_of(vm).libraries,
        disk=vm.initrd,
        vm_dir=vm.vm_dir,
        mem_mib=vm.mem_mib,
        processes=options_of(vm).processes,
        arguments=tuple(arguments),
        has_balloon=vm.reports_free_pages,
        standby=vm.standby,
        cgroups=vm.cgroups,
    )


def processes_on(pid_max: int) -> int:
    """How many processes a machine may have on a host with so many ids (/proc/sys/kernel/pid_max)."""
    return min(PROCESSES_MAX, pid_max // PART_OF_PIDS)


def plan_jail(plan: UmlPlan, uid: int, netns: Path | None) -> JailPlan:
    """What the kernel, and with it whoever has broken out of the guest, finds of the host."""
    binds = [Bind(plan.program, str(KERNEL), Access.EXECUTE), Bind(REGSET, str(LIBRARY), Access.EXECUTE)]
    binds += [Bind(library, str(library), Access.EXECUTE) for library in plan.libraries]
    binds += [Bind(plan.disk, str(DISK)), Bind(plan.sockets, str(SOCKETS)), Bind(plan.cpuinfo, CPUINFO)]
    if netns is not None or plan.standby:  # interfaces may come later
        binds.append(Bind(TUN, str(TUN), Access.DEVICE))
    return JailPlan(
        uid=uid,
        binds=tuple(binds),
        tmpfs=(Tmpfs(str(WORK), plan.mem_mib + WORK_BEYOND_MIB << 20, executable=True, huge_pages=True),),
        limits=JailLimits(processes=plan.processes, file_bytes=(plan.mem_mib << 20) + MEMORY_FILE_BEYOND),
        calls=CallFilter(CALLS),
        netns=netns,
        # Between the kernel and its memory there is the heap's random gap of up to 1 GiB, for which it makes page
        # structures, 64 bytes a page. It is linked to a fixed address itself.
        fixed_addresses=True,
        cgroups=plan.cgroups,
    )


def plan_kernel_params(vm: VmSpec) -> list[str]:
    """What of the command line is the guest's own; later values win."""
    params = [
        f"lpj={LOOPS_PER_JIFFY}",  # the first: what is before it is the VMM's
        *UML_ROOT,
        f"initcall_blacklist={','.join(LEFT_OUT)}",
        "cryptomgr.notests",
        "net.ifnames=0",
        "lsm=yama",  # without a word it is SELinux, which has no policy
        *_hash_tables(vm.mem_mib),
        "pty.legacy_count=0",  # 512 terminals of the old kind: a third of the CPU time of a boot
        "cgroup_no_v1=all",
        f"katapod.processes={options_of(vm).processes}",  # what the jail lets it have: the agent keeps some for itself
        "agent.hotplug_timeout=30",  # 40 guests that start at once on two cores are slow to find their devices
        "debug" if vm.debug else "quiet",
        "panic=1",  # a kernel that only stood still would spin for ever
    ]
    if vm.debug:
        params.append("agent.log=debug")
    if vm.debug_console:
        params += ["agent.debug_console", "agent.debug_console_vport=1026"]
    return [*params, *vm.kernel_params]


def _hash_tables(mem_mib: int) -> list[str]:
    """Smaller ones than the kernel makes, a quarter of their entries at most: it writes to all of them at its start."""
    unit = max(256, 1 << (mem_mib - 1).bit_length())
    return [f"{name}{unit * of_each_mib}" for name, of_each_mib in HASH_TABLES.items()]


def render_uml(plan: UmlPlan, fds: Mapping[FdSlot, int]) -> list[str]:
    """The arguments behind argv[0]."""
    return [
        argument.text.format(fd=fds[argument.slot]) if argument.slot is not None else argument.text
        for argument in plan.arguments
    ]


def _virtio(socket: str, device_id: int) -> str:
    return f"virtio_uml.device={SOCKETS / socket}:{device_id}"
