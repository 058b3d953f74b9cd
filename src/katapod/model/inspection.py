"""What inspect finds out of a sandbox: facts of host and guest at one moment, and why some are missing.

The names of the fields are the keys of `kata-runtime inspect --json`: they stay, more may come. What the guest says
has been cut to the limits below, and is otherwise as it came: who shows it escapes it. Sizes are bytes where the name
does not say otherwise.
"""

from msgspec import Struct

__all__ = [
    "FACTS_VERSION",
    "LIVE_BYTES_MAX",
    "UNKNOWN_PART",
    "Channel",
    "Confinement",
    "ContainerFacts",
    "CpuFacts",
    "Counters",
    "Device",
    "Disk",
    "GuestFacts",
    "GuestLink",
    "GuestMount",
    "GuestProcess",
    "GuestRoute",
    "Hypervisor",
    "KernelModule",
    "Link",
    "LiveFacts",
    "Missing",
    "NamespaceMember",
    "NetworkFacts",
    "Nic",
    "OptionPart",
    "Process",
    "RecordedDevice",
    "Redirect",
    "SandboxFacts",
    "ShareFacts",
    "SharedMount",
    "Unit",
]

FACTS_VERSION = 1
UNKNOWN_PART = "not in the table of this program"  # the meaning of an OptionPart that is not known
LIVE_BYTES_MAX = 4 * 1024 * 1024  # of LiveFacts as JSON


class Missing(Struct, frozen=True):
    """A part that is not known, such as `guest` or `network.nft`, and why."""

    part: str
    why: str


class OptionPart(Struct, frozen=True):
    """A piece of a command line and what it is for; `part` is as written, `known` False: not in our table.

    `details`: the pieces of its value that have an explanation of their own.
    """

    part: str
    meaning: str
    known: bool = True
    details: tuple["OptionPart", ...] = ()


class Confinement(Struct, frozen=True, kw_only=True):
    """What a process is kept from. `capabilities`: numbers of linux/capability.h that it has or can get. `namespaces`:
    those that it does not share with process 1 (with the observer, where process 1 hides its own), by their names in
    /proc/PID/ns."""

    capabilities: tuple[int, ...] = ()
    no_new_privileges: bool = False
    seccomp: bool = False  # its system calls are filtered
    namespaces: tuple[str, ...] = ()


class Process(Struct, frozen=True, kw_only=True):
    """A process of this host. `role`: supervisor, shim, vmm, vmm-helper (started by the VMM), virtiofsd, storage (who
    serves the VMM's disks), other."""

    pid: int
    parent: int
    role: str
    command: tuple[str, ...]
    state: str = ""  # one letter, as in ps(1): T is stopped
    user: int = 0
    rss: int = 0
    cpu_seconds: float = 0.0
    threads: tuple[tuple[int, str], ...] = ()  # (tid, name)
    confinement: Confinement | None = None  # None: it could not be read

    @property
    def program(self) -> str:
        """Its name; User-mode Linux has the directory of its machine behind it."""
        return self.command[0].partition(" /")[0].rpartition("/")[2]


class RecordedDevice(Struct, frozen=True, kw_only=True):
    """A device of the VM as it is on record. `kind`: share, disk, nic, memory. `in_vmm`: whether the VMM has it where
    the record says; None: the VMM was not asked."""

    kind: str
    name: str  # tag, id of a disk, interface in the pod's network namespace, number of a DIMM
    slot: int | None = None  # None: it takes none
    host: str = ""  # what is behind it: socket, file or device, tap
    backing: str = ""  # the file below it that is only read
    read_only: bool = False
    size_mib: int = 0  # of memory
    guest_path: str = ""
    in_vmm: bool | None = None


class Device(Struct, frozen=True, kw_only=True):
    """A device of the VM. `origin`: command line, hot-plug, or built in (of the machine type)."""

    device_id: str = ""
    driver: str = ""
    what: str = ""
    origin: str = ""
    pci: str = ""  # bus:slot.function as the guest's lspci has it
    guest_path: str = ""  # as the agent protocol names it: 02/01


class Disk(Struct, frozen=True, kw_only=True):
    """`backing`: the file below it that is only read; `guest_mount`: where the guest has it, if it says so."""

    device_id: str
    file: str = ""
    backing: str = ""
    form: str = ""  # raw, qcow2
    read_only: bool = False
    size: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    guest_path: str = ""
    guest_mount: str = ""


class CpuFacts(Struct, frozen=True):
    number: int
    thread: int


class Hypervisor(Struct, frozen=True, kw_only=True):
    """What the VMM answers to questions: QEMU by QMP, User-mode Linux by mconsole. `name`: for people."""

    version: str = ""
    status: str = ""  # running, paused, ...
    accelerator: str = ""
    cpus: tuple[CpuFacts, ...] = ()
    base_memory: int = 0
    plugged_memory: int = 0
    balloon: int = 0  # what the guest has of it, 0: not told
    devices: tuple[Device, ...] = ()
    disks: tuple[Disk, ...] = ()
    name: str = "QEMU"


class Counters(Struct, frozen=True):
    """Of an interface, seen from where it is; or of a filter, which has bytes and packets in `rx_` alone."""

    rx_bytes: int = 0
    rx_packets: int = 0
    tx_bytes: int = 0
    tx_packets: int = 0
    rx_dropped: int = 0
    tx_dropped: int = 0


class Link(Struct, frozen=True, kw_only=True):
    """An interface in the pod's network namespace, or its peer elsewhere."""

    name: str
    index: int = 0
    kind: str = ""
    peer_index: int = 0  # the N of eth0@ifN
    mac: str = ""
    mtu: int = 0
    up: bool = False
    master: str = ""  # the bridge it is in
    addresses: tuple[str, ...] = ()
    counters: Counters = Counters()


class Redirect(Struct, frozen=True, kw_only=True):
    """A tc filter at ingress of `source` that takes every frame to `target`."""

    source: str
    target: str
    kind: str = ""  # u32
    match: str = ""
    bytes: int = 0
    packets: int = 0
    dropped: int = 0


class Nic(Struct, frozen=True, kw_only=True):
    """One interface of the pod and how it becomes the guest's. `peer`: the other end of a veth pair."""

    interface: str
    tap: str = ""
    model: str = ""
    peer: Link | None = None
    peer_where: str = ""


class NamespaceMember(Struct, frozen=True):
    pid: int
    command: str


class NetworkFacts(Struct, frozen=True, kw_only=True):
    """`nft`: the ruleset as text; `qdiscs`: lines of tc, `routes`: lines of ip."""

    netns: str
    inode: int = 0
    members: tuple[NamespaceMember, ...] = ()
    links: tuple[Link, ...] = ()
    nics: tuple[Nic, ...] = ()
    redirects: tuple[Redirect, ...] = ()
    qdiscs: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()
    nft: str = ""


class SharedMount(Struct, frozen=True, kw_only=True):
    """Something of the host that the guest sees through virtio-fs, and where a container has it."""

    name: str  # below the shared directory
    host: str
    fstype: str = ""
    read_only: bool = False
    guest: str = ""
    container: str = ""  # id
    destination: str = ""  # in the container; / for its root file system


class ShareFacts(Struct, frozen=True, kw_only=True):
    tag: str
    directory: str  # of the host, that virtiofsd serves
    guest: str  # its mount point
    socket: str = ""
    virtiofsd: int = 0  # pid of the one that serves
    mounts: tuple[SharedMount, ...] = ()


class Channel(Struct, frozen=True, kw_only=True):
    """How the supervisor and the agent speak. `kind`: vsock or serial port."""

    kind: str
    address: str


class ContainerFacts(Struct, frozen=True, kw_only=True):
    container_id: str
    name: str = ""
    image: str = ""
    command: tuple[str, ...] = ()
    state: str = ""
    started_at: float = 0.0
    finished_at: float = 0.0
    exit_code: int | None = None
    oom_killed: bool = False
    error: str = ""


class KernelModule(Struct, frozen=True):
    name: str
    size: int = 0
    used: int = 0


class GuestMount(Struct, frozen=True):
    source: str
    target: str
    fstype: str
    options: str = ""


class GuestProcess(Struct, frozen=True, kw_only=True):
    """`container`: its id; empty for the guest's own. `command` is in brackets for a kernel thread."""

    pid: int
    parent: int = 0
    command: str = ""
    state: str = ""
    rss: int = 0
    container: str = ""


class GuestLink(Struct, frozen=True, kw_only=True):
    name: str
    mac: str = ""
    mtu: int = 0
    up: bool = False
    addresses: tuple[str, ...] = ()
    counters: Counters = Counters()


class GuestRoute(Struct, frozen=True, kw_only=True):
    destination: str  # default, or ADDRESS/PREFIX
    gateway: str = ""
    device: str = ""
    source: str = ""


class Unit(Struct, frozen=True):
    name: str
    load: str = ""
    active: str = ""
    sub: str = ""
    what: str = ""


class GuestFacts(Struct, frozen=True, kw_only=True):
    """What the guest's agent says. Nothing of it can be relied upon: a container may have broken out into it.

    `cut`: it said more than there is room for; lists then have their beginnings.
    """

    kernel: str = ""
    kernel_build: str = ""
    kernel_parameters: str = ""
    agent: str = ""
    init: str = ""
    hostname: str = ""
    uptime_s: float = 0.0
    cpus: int = 0
    memory_total: int = 0
    memory_free: int = 0
    memory_available: int = 0
    modules: tuple[KernelModule, ...] = ()
    mounts: tuple[GuestMount, ...] = ()
    processes: tuple[GuestProcess, ...] = ()
    units: tuple[Unit, ...] = ()
    links: tuple[GuestLink, ...] = ()
    routes: tuple[GuestRoute, ...] = ()
    cut: bool = False


class LiveFacts(Struct, frozen=True, kw_only=True):
    """What is asked of the VMM and of the agent: by the supervisor, which has the one connection to the agent."""

    hypervisor: Hypervisor | None = None
    guest: GuestFacts | None = None
    channel: Channel | None = None
    missing: tuple[Missing, ...] = ()


class SandboxFacts(Struct, frozen=True, kw_only=True):
    """All of a sandbox. A part that is None or empty, though it should not be, is named in `missing`."""

    version: int = FACTS_VERSION
    sandbox_id: str
    state: str
    taken_at: float  # seconds since the epoch
    created_at: float = 0.0
    error: str = ""
    labels: dict[str, str] = {}
    accelerator: str = ""
    template: str = ""  # empty: the guest booted
    vcpus: int = 0
    memory_mib: int = 0
    containers: tuple[ContainerFacts, ...] = ()
    processes: tuple[Process, ...] = ()
    cgroups: tuple[str, ...] = ()
    command_line: tuple[OptionPart, ...] = ()  # of the VMM
    kernel_parameters: tuple[OptionPart, ...] = ()  # of the guest
    devices: tuple[RecordedDevice, ...] = ()  # on record
    hypervisor: Hypervisor | None = None
    network: NetworkFacts | None = None
    share: ShareFacts | None = None
    channel: Channel | None = None
    guest: GuestFacts | None = None
    files: dict[str, str] = {}  # what lies where on this host
    missing: tuple[Missing, ...] = ()
