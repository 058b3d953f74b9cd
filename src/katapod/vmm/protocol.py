"""What a VMM can do, and what may be asked of a VM that it runs: the seam between a sandbox and its VMM.

A VMM is a value without a state of its own; it starts a VirtualMachine, which stands still until run(). Before that
devices are attached, or a saved state is loaded; what may still be changed while the guest runs, Capabilities say. A
VMM that takes devices on its command line only may begin with run(); whoever cleans up finds its processes by their
command lines (processes.py).

Whoever started a VM is its VirtualMachine's owner as long as both live. Another process may connect to it beside, for
what VmControl has; that both keep out of each other's way is theirs to see to (sandbox/devices.py).

Errors of all calls: VmmRefused, where the machine is as before; VmmLinkBroken, where it is not known.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from enum import Enum
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct

from katapod.vmm.spec import VmmOptions, VmSpec

if TYPE_CHECKING:
    import asyncio

    from katapod.model.config import Config
    from katapod.model.inspection import Hypervisor, Missing, OptionPart
    from katapod.vmm.devices import Device
    from katapod.vmm.errors import VmmFailed
    from katapod.vmm.judge import Judge

__all__ = ["Capabilities", "Channel", "DiskError", "Handed", "VirtualMachine", "VmControl", "Vmm", "VmmLogs"]


class Channel(Enum):
    """A stream of bytes between the guest and us. With a vsock it has none of them: both ends dial there."""

    AGENT = "agent"
    DEBUG_CONSOLE = "debug-console"


class Handed(Enum):
    """A descriptor that whoever starts a VM has opened, and closes."""

    VSOCK = "vsock"  # /dev/vhost-vsock with the CID of VmSpec claimed
    MEMORY = "memory"  # a memfd of VmSpec.mem_mib
    STATE = "state"  # a file of a template, for load_state


class VmmLogs(Struct, frozen=True):
    console: Path  # what the guest kernel and its init say
    vmm: Path  # what the VMM says
    limit_bytes: int = 256 * 1024


class Capabilities(Struct, frozen=True):
    """What of a VM can be changed, what it can have, and how it is reached.

    Slots are numbers for places in the machine; no two devices have the same one. They are taken in the order in which
    they stand here, and a slot may be in both lists.
    """

    disk_slots: tuple[int, ...]
    nic_slots: tuple[int, ...]
    share_slot: int
    vsock: bool = True  # else Channel.AGENT
    templates: bool = True
    hotplug: bool = True  # disks and NICs, while the guest runs
    agent_lets_go: bool = False  # the guest's agent has to let go of them before they are detached
    memory_hotplug: bool = True
    vcpu_hotplug: bool = True
    vcpus_max: int = 0  # 0: no bound of the VMM's own
    real_memory: bool = True  # huge pages, or all of it taken at once
    more_slots: str = ""  # how to have more of them, in words for people; empty: there is no way
    programs_32bit: bool = True
    qemu_keys: bool = True  # the keys of [hypervisor.qemu] for the guest and its machine, and modules for its kernel
    own_user: bool = False  # it runs as VmSpec.uid
    taps_by_name: bool = False  # it opens taps by name, as that user, and is not handed their descriptors
    plugs_standing: bool = True  # once it has run, devices can be attached while the guest stands still


class DiskError(Struct, frozen=True):
    """The VMM could not read or write a disk's file on the host."""

    disk_id: str
    writing: bool
    full: bool  # for want of space; else for an error of the file's
    stopped: bool  # the VMM has stopped the guest for it; else the guest was told


class VmControl(Protocol):
    """A connection to a VM that runs: what whoever started it and any other process may ask of it."""

    async def attach(self, device: "Device") -> str:
        """Returns where the guest finds it: for disks and NICs a path of PCI slots, "02/01"; empty for memory.

        What was done of an attachment that fails is undone. Raises NoSpace, KatapodError for an overlay that cannot be
        made, too.
        """

    async def detach(self, device: "Device") -> None:
        """Take a disk or a NIC out; waits until the guest has let go of it. After a failure it may be called again, by
        another process too, and takes up what is left."""

    async def settle(self, device: "Device") -> bool:
        """Return whether the device is there. What is left of one that somebody has attached or detached half is
        undone."""

    def expect_memory(self, last: int) -> "asyncio.Future[str]":
        """The guest's answer about the DIMM of this number, or its refusal of an earlier one: empty if it uses all of
        them, else what it says. Call it before they are attached."""

    async def resize_disk(self, disk_id: str, size: int) -> None:
        """Have the guest see that the file of a disk has another size by now, bytes."""

    async def facts(self, limit_s: float) -> "tuple[Hypervisor | None, list[Missing]]":
        """What it says of itself, and why something is missing. Raises nothing: an observer gets what there is."""


class VirtualMachine(VmControl, Protocol):
    """One VM. `stopping`: it was asked to end; `expendable`: nothing in the guest is worth a graceful end."""

    logs: VmmLogs
    stopping: bool
    expendable: bool

    @property
    def pid(self) -> int:
        """The process that is the VM: what it uses, the VM uses; when it ends, the VM ends. 0 before it is
        there: at the latest once run() is over."""

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: a signal."""

    def take_channel(self, channel: Channel) -> socket | None:
        """Hand our end of a channel to the caller, who owns it from now on; None if there is none, or it was taken."""

    async def run(self) -> None: ...
    async def pause(self) -> None: ...

    async def add_vcpus(self, count: int) -> None:
        """Raises KatapodError too: the machine has no room for so many."""

    async def vcpu_threads(self) -> Sequence[int]:
        """Thread ids."""

    def busy_s(self) -> float:
        """Seconds that the virtual CPU with the most time to spare has run or waited for a CPU; 0 once it has ended."""

    async def save_state(self, path: Path) -> None:
        """Stop the guest and write its state to the file `path`, without its memory, which stays in Handed.MEMORY.
        Raises OSError too."""

    async def load_state(self, state_fd: int) -> None:
        """Take over the state of a saved guest, whose memory Handed.MEMORY holds by now; it is stopped then."""

    def on_disk_error(self, handler: Callable[[DiskError], None]) -> None:
        """Have `handler` called from now on. It must raise nothing."""

    def expect_stop(self) -> "asyncio.Future[Any]":
        """When the VMM next stops the guest by itself. Call it before run()."""

    async def wait_end(self) -> str:
        """Block until the VM has ended; returns how, in words."""

    def explain_end(self) -> "VmmFailed":
        """The error to raise when it has ended and nobody asked it to."""

    async def stop(self, *, soft: bool = True) -> bool:
        """End it: by a request, a wait and a kill; at once if it is expendable. Returns whether it ended gracefully."""


class Vmm(Protocol):
    """A kind of VMM. Equal ones make the same machine of the same VmSpec."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def judge(self) -> "Judge":
        """Who can read what it says of a boot that failed."""

    def program(self, config: "Config") -> str: ...

    def guest(self, config: "Config") -> tuple[Path, Path]:
        """Kernel and initrd."""

    def guest_params(self, config: "Config") -> tuple[str, ...]:
        """What the configuration adds to the kernel's command line."""

    def options(self, config: "Config") -> VmmOptions: ...
    def capabilities(self, spec: VmSpec) -> Capabilities: ...

    def describe(self, spec: VmSpec) -> str:
        """The whole machine in lines: equal for machines that can be restored from the same state."""

    def describe_for_host(self, spec: VmSpec) -> str:
        """The same without what only the guest is told, or what it is reached by: what the host has to be able to."""

    def files(self, spec: VmSpec) -> tuple[str | Path, ...]:
        """Beside the initrd, those whose content makes the machine."""

    def kernel_params(self, spec: VmSpec) -> str: ...

    def explain(self, command: Sequence[str]) -> "tuple[OptionPart, ...]":
        """The command line of a process of its own, piece by piece."""

    def kernel_parameters_in(self, command: Sequence[str]) -> str:
        """Those that it gives the guest's kernel; empty if it loads none."""

    def start(
        self, spec: VmSpec, logs: VmmLogs, *, given: Mapping[Handed, int] | None = None, netns: Path | None = None
    ) -> AbstractAsyncContextManager[VirtualMachine]:
        """Start a VM that stands still; stop it at the end. It runs in the network namespace `netns`, if given.

        Raises VmmFailed with what the VMM said when it does not come up, MissingProgram.
        """

    def connect(self, vm_dir: Path, limit_s: float) -> AbstractAsyncContextManager[VmControl]:
        """Connect to a running VM whose files lie in `vm_dir`, as a process that did not start it: one at a time.

        Raises VmmRefused if this VMM takes no such connection, VmmLinkBroken if it does not answer within `limit_s`.
        """
