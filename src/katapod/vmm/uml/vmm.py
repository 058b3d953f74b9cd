"""User-mode Linux as a Vmm."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from katapod.model.config import Config, config_kernel_params
from katapod.vmm.judge import Judge
from katapod.vmm.protocol import Capabilities, Handed, VirtualMachine, VmmLogs
from katapod.vmm.spec import VmSpec
from katapod.vmm.uml.disk_server import STORAGE_DAEMON, has_disk_server
from katapod.vmm.uml.disks import DISKS_MAX, FIRST_SLOT
from katapod.vmm.uml.libraries import libraries_of
from katapod.vmm.uml.nics import NICS_MAX
from katapod.vmm.uml.plan import HASH_TABLES, UmlOptions, options_of, plan_kernel_params, plan_uml, processes_on

if TYPE_CHECKING:
    from katapod.model.inspection import OptionPart
    from katapod.vmm.uml.control import UmlControl

__all__ = ["Uml"]

PID_MAX = Path("/proc/sys/kernel/pid_max")
SHARE_SLOT = 0  # there is no bus: slots are only numbers
NIC_SLOTS = tuple(range(1, 1 + NICS_MAX))
DISK_SLOTS = tuple(range(FIRST_SLOT, FIRST_SLOT + DISKS_MAX))
TO_THE_GUEST = ("mem=", *HASH_TABLES)  # what depends on the size of its memory


class Uml(Struct, frozen=True):
    name: str = "User-mode Linux"

    @property
    def judge(self) -> Judge:
        from katapod.vmm.uml.judge import UmlJudge  # for boots that fail

        return UmlJudge()

    def program(self, config: Config) -> str:
        """The kernel itself."""
        return config.uml.kernel

    def guest(self, config: Config) -> tuple[Path, Path]:
        return Path(config.uml.kernel), Path(config.uml.image)

    def guest_params(self, config: Config) -> tuple[str, ...]:
        return config_kernel_params(config, config.uml.kernel_params)

    def options(self, config: Config) -> UmlOptions:
        return UmlOptions(
            libraries=libraries_of(Path(config.uml.kernel)),
            has_disks=has_disk_server(),
            processes=processes_on(int(PID_MAX.read_text())),
        )

    def capabilities(self, spec: VmSpec) -> Capabilities:
        return Capabilities(
            disk_slots=DISK_SLOTS if options_of(spec).has_disks else (),
            nic_slots=NIC_SLOTS,
            share_slot=SHARE_SLOT,
            vsock=False,
            templates=False,
            agent_lets_go=True,
            memory_hotplug=False,
            vcpu_hotplug=False,
            vcpus_max=1,
            real_memory=False,
            programs_32bit=False,
            qemu_keys=False,
            more_slots=f"install {STORAGE_DAEMON}, package qemu-utils" if not options_of(spec).has_disks else "",
            own_user=True,
            taps_by_name=True,
            plugs_standing=False,
        )

    def describe(self, spec: VmSpec) -> str:
        return plan_uml(spec).describe()

    def describe_for_host(self, spec: VmSpec) -> str:
        lines = self.describe(spec).splitlines()
        return "\n".join(line for line in lines if not line.strip().startswith(TO_THE_GUEST))

    def files(self, spec: VmSpec) -> tuple[str | Path, ...]:
        return (spec.kernel,)

    def kernel_params(self, spec: VmSpec) -> str:
        return " ".join(plan_kernel_params(spec))

    def explain(self, command: Sequence[str]) -> "tuple[OptionPart, ...]":
        from katapod.vmm.uml.explain import explain_command_line  # for people who look on

        return explain_command_line(command)

    def kernel_parameters_in(self, command: Sequence[str]) -> str:
        from katapod.vmm.uml.explain import kernel_parameters_in

        return kernel_parameters_in(command)

    def start(
        self, spec: VmSpec, logs: VmmLogs, *, given: Mapping[Handed, int] | None = None, netns: Path | None = None
    ) -> "AbstractAsyncContextManager[VirtualMachine]":
        from katapod.vmm.uml.machine import standing_uml  # not for plans

        return standing_uml(spec, logs, netns=netns)

    def connect(self, vm_dir: Path, limit_s: float) -> "AbstractAsyncContextManager[UmlControl]":
        from katapod.vmm.uml.control import connected_uml

        return connected_uml(vm_dir, limit_s)
