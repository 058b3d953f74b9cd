"""What a sandbox asks of its VMM, and whether one can do it: by that `auto` passes a rung of the ladder over. Pure."""

from msgspec import Struct, structs

from katapod.model.config import Config, config_of
from katapod.model.config_keys import TABLES
from katapod.vmm.protocol import Capabilities

__all__ = ["NO_NEEDS", "Needs", "lacking", "needs_of_config"]

_QEMU_ONLY = (
    "machine_accelerators",
    "firmware",
    "cpu_features",
    "pcie_root_port",
    "extra_monitor_socket",
    "entropy_source",
)
"""Keys of [hypervisor.qemu] that change what the guest finds, or how people reach it."""

_TWINS = {"kernel": "kernel", "initrd": "image", "kernel_params": "kernel_params"}
"""The same for which [hypervisor.uml] has a key of its own: who has set both means both."""


class Needs(Struct, frozen=True):
    """What not every VMM has."""

    vcpus: int = 1  # at its start
    resized: bool = False  # containers come later, for limits that nobody has announced
    disks: bool = False  # block devices of the host
    real_memory: bool = False  # huge pages, or all of it taken at once
    template: bool = False
    programs_32bit: bool = False
    key: str = ""  # of the configuration, set, of which not every VMM takes notice

    @property
    def now(self) -> "Needs":
        """Without what may never be asked for: where a VMM is forced, that is refused when it comes."""
        return structs.replace(self, resized=False, disks=False, key="")


NO_NEEDS = Needs()


def lacking(can: Capabilities, needs: Needs) -> str:
    """What a VMM with these capabilities cannot do of it, in words that follow its name; empty: it can do all."""
    if can.vcpus_max and needs.vcpus > can.vcpus_max:
        return f"has {can.vcpus_max} vCPU at most, and {needs.vcpus} are asked for"
    if needs.resized and not (can.memory_hotplug and can.vcpu_hotplug):
        return "adds no memory and no vCPU to a guest that runs, and nobody has said how much memory the pod will need"
    if needs.disks and not (can.disk_slots and can.hotplug):
        return "takes no disks while its guest runs, and a block device or a direct volume may be asked for"
    if needs.real_memory and not can.real_memory:
        return "has no huge pages and takes no memory ahead, and that is asked for"
    if needs.template and not can.templates:
        return "has no templates: its guests boot each time"
    if needs.programs_32bit and not can.programs_32bit:
        return "runs no 32-bit programs, and those are asked for"
    if needs.key and not can.qemu_keys:
        return f"takes no notice of {needs.key}, which is set"
    return ""


def needs_of_config(config: Config) -> Needs:
    """What each sandbox of this configuration asks for."""
    return Needs(real_memory=config.qemu.enable_mem_prealloc or config.qemu.enable_hugepages, key=_key_set(config))


def _key_set(config: Config) -> str:
    flavour = {"katapod": {"guest_flavour": config.katapod.guest_flavour}}
    usual = config_of({table: flavour.get(table, {}) for table in TABLES})
    for key in (*_QEMU_ONLY, *_TWINS):
        if getattr(config.qemu, key) == getattr(usual.qemu, key):
            continue
        twin = _TWINS.get(key, "")
        if not twin or getattr(config.uml, twin) == getattr(usual.uml, twin):
            return f"{key} of [hypervisor.qemu]"
    return "kernel_modules of [agent.kata]" if config.agent.kernel_modules else ""
