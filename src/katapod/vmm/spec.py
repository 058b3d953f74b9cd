"""One VM as a value, whichever VMM will run it."""

from enum import Enum
from pathlib import Path

from msgspec import Struct

from katapod.model.uid_range import DEFAULT_UIDS, UidRange

__all__ = [
    "AGENT_PORT_NAME",
    "ANY_CID",
    "CONSOLE_PORT_NAME",
    "NO_OPTIONS",
    "NO_REMEDY",
    "Accelerator",
    "CpuRemedy",
    "VmSpec",
    "VmmOptions",
]

AGENT_PORT_NAME = "katapod.agent.0"  # of the serial port, where there is no vsock
CONSOLE_PORT_NAME = "katapod.console.0"
ANY_CID = 3  # in a plan: a vsock with whatever CID is claimed for it; the lowest that a guest may have


class Accelerator(Enum):
    KVM = "kvm"
    UML = "uml"
    TCG = "tcg"


class CpuRemedy(Struct, frozen=True):
    """What of the CPU differs from the plan, since KVM does not run guests without (proof.py). Empty: nothing."""

    features: str = ""  # behind the configuration's
    model: str = ""  # in place of the accelerator's

    def __bool__(self) -> bool:
        return bool(self.features or self.model)

    def __str__(self) -> str:
        return ",".join(part for part in (f"-cpu {self.model}" if self.model else "", self.features) if part)


NO_REMEDY = CpuRemedy()


class VmmOptions(Struct, frozen=True):
    """What only one kind of VMM has: each derives its own."""

    def without_onlookers(self) -> "VmmOptions":
        """Without what is only for people who look on."""
        return self


NO_OPTIONS = VmmOptions()


class VmSpec(Struct, frozen=True):
    """One VM, decided. Sizes in MiB."""

    sandbox_id: str
    uuid: str
    program: str  # of the VMM
    kernel: Path
    initrd: Path
    accelerator: Accelerator
    mem_mib: int  # that it is started with
    max_mem_mib: int  # with all that may be plugged
    vcpus: int  # likewise
    max_vcpus: int
    vm_dir: Path  # of the VMM's own files
    vsock_cid: int | None = None
    cpu_features: str = ""
    remedy: CpuRemedy = NO_REMEDY
    entropy_source: str = "/dev/urandom"
    kernel_params: tuple[str, ...] = ()  # behind the VMM's own
    debug: bool = False
    debug_console: bool = False
    memory_is_given: bool = False  # guest memory is Handed.MEMORY, ours to save or to fill, not the VMM's own
    translation_cache_mib: int = 0  # bound of what emulation keeps of translated code; 0: the VMM's own
    tsc_khz: int = 0  # of the host's time stamp counter, which an emulated guest has as well; 0: not known
    preallocated: bool = False  # all memory is taken from the host at once
    hugepages: bool = False  # and is of huge pages
    reports_free_pages: bool = True
    standby: bool = False  # it is made ahead: NICs come after its first run()
    restored: bool = False  # state comes from a template: no kernel is loaded, the VMM waits for load_state
    options: VmmOptions = NO_OPTIONS
    uids: UidRange = DEFAULT_UIDS  # of which the VMM gets one, where Capabilities say own_user
    cgroups: tuple[Path, ...] = ()  # that the VMM joins by itself, beside those of its supervisor
    uid: int = 0  # of the user that the VMM runs as, where Capabilities say own_user; it has no other process
