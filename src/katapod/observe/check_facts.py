"""What `kata-runtime check` looks at, as values: facts of the host go in, lines come out.

Facts are collected by observe/check_host.py and judged by observe/check_machine.py and observe/check_software.py.
"""

from enum import Enum

from msgspec import Struct, field

__all__ = [
    "AcceleratorFacts",
    "RungFacts",
    "CheckFacts",
    "DeviceFacts",
    "EngineFacts",
    "ImageFacts",
    "Line",
    "ModuleState",
    "Outcome",
    "ProgramFacts",
    "SpaceFacts",
    "Trial",
    "install",
    "shown_duration",
]


class Outcome(Enum):
    OK = "ok"
    LESS = "less"  # works with less
    MISSING = "missing"  # sandboxes do not start
    UNKNOWN = "unknown"  # could not be looked at, for want of rights or of a boot
    NOTE = "note"  # neither good nor bad


class Line(Struct, frozen=True):
    """One verdict. `line_id` is stable: programs may rely on it."""

    line_id: str
    title: str
    outcome: Outcome
    found: str
    effect: str = ""  # what does not work, or works otherwise
    remedy: str = ""  # what to install or set
    evidence: tuple[str, ...] = ()  # how that was found out


class ModuleState(Enum):
    LOADED = "loaded"  # or built into the kernel
    LOADABLE = "loadable"
    ABSENT = "absent"  # this kernel does not have it


class DeviceFacts(Struct, frozen=True):
    """A node below /dev and the module behind it. `error`: why it does not open; empty if it does."""

    path: str
    error: str
    module: str
    module_state: ModuleState

    @property
    def opens(self) -> bool:
        return not self.error


class ProgramFacts(Struct, frozen=True):
    """`path`: where it was found, or, if `found` is false, where it was looked for. `version`: its own first line."""

    name: str
    path: str
    found: bool
    version: str = ""


class Trial(Struct, frozen=True):
    """Something that was really done. `works` is None if it was not tried; `said`: the error, or why not."""

    works: bool | None
    said: str = ""


class SpaceFacts(Struct, frozen=True):
    """Room below a directory, or below the nearest that exists."""

    path: str
    free_mib: int
    fs_type: str
    error: str = ""


class ImageFacts(Struct, frozen=True):
    """The guest's kernel and initrd, as the configuration names them."""

    kernel: str
    initrd: str
    kernel_error: str = ""  # why the file cannot be used; empty if it can
    initrd_error: str = ""
    built_in_place: bool = True  # the configuration names the links that `image build` keeps
    complete: bool = False  # manifest and sizes agree
    kernel_version: str = ""
    newest_kernel: str = ""  # the newest that is installed here with its modules
    size_mib: float = 0.0
    age_s: float = 0.0
    notes: tuple[str, ...] = ()


class AcceleratorFacts(Struct, frozen=True):
    """What the proof said (docs/adr/0007). `chosen`: kvm, uml, tcg, or empty if nothing was found out yet."""

    wanted: str  # auto, kvm, uml, tcg
    chosen: str = ""
    reason: str = ""
    age_s: float | None = None  # of the verdict; None: found out just now, or forced
    boot: Trial = field(default_factory=lambda: Trial(None, "not tried; --boot boots the image"))
    boot_s: float = 0.0
    advice: str = ""  # what to set
    said: str = ""  # QEMU's own words, of boots that failed


class RungFacts(Struct, frozen=True):
    """What the proof of one accelerator said. `works`: None if that was not found out yet."""

    works: bool | None = None
    installed: bool = True  # its guest image is there
    reason: str = ""
    age_s: float | None = None
    advice: str = ""
    said: str = ""  # the VMM's own words, of boots that failed


class EngineFacts(Struct, frozen=True):
    """containerd or CRI-O. `handlers`: names of the runtime handlers that lead to the shim; `files`: what was read."""

    name: str
    program: ProgramFacts
    handlers: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    problem: str = ""  # a file that cannot be read or parsed


class CheckFacts(Struct, frozen=True):
    root: bool
    architecture: str
    cpu_vendor: str
    cpu_flags: frozenset[str]
    cpus: int
    kernel_release: str
    devices: tuple[DeviceFacts, ...]
    configuration: str  # the file that was read
    configuration_error: str
    programs: tuple[ProgramFacts, ...]
    image: ImageFacts
    accelerator: AcceleratorFacts
    kvm: RungFacts
    uml: RungFacts
    cgroup_version: int  # 0: there are none
    cgroup_controllers: frozenset[str]
    cgroup_writable: bool
    trials: dict[str, Trial]
    cni_plugins: dict[str, str]  # name to path, empty if it is not there
    cni_dirs: tuple[str, ...]
    cni_networks: tuple[str, ...]
    cni_problems: tuple[str, ...]
    mem_mib: int
    mem_available_mib: int
    default_memory_mib: int
    spaces: dict[str, SpaceFacts]
    capabilities: frozenset[str]  # of those that matter here, the effective ones
    open_files: int  # RLIMIT_NOFILE, hard
    shim: str  # path of containerd-shim-kata-v2, empty if an engine would not find it
    engines: tuple[EngineFacts, ...]


def shown_duration(seconds: float) -> str:
    """A rough age for people."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"


def install(deb: str, rpm: str = "") -> str:
    """A remedy: the package, by its Debian name and its name in Fedora and RHEL where that differs."""
    return f"apt-get install {deb}   (dnf install {rpm or deb})"
