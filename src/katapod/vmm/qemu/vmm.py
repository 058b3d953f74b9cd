"""QEMU as a Vmm."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from katapod.model.config import Config, config_kernel_params
from katapod.vmm.judge import Judge
from katapod.vmm.protocol import Capabilities, Handed, VmmLogs
from katapod.vmm.qemu.command_line import (
    BRIDGES_MAX,
    FdSlot,
    QemuOptions,
    options_of,
    plan_kernel_params,
    plan_qemu,
)
from katapod.vmm.qemu.control import QemuControl, connected_qemu
from katapod.vmm.qemu.hotplug import BRIDGE_SLOTS, more_bridge_slots
from katapod.vmm.qemu.process import QemuProcess, running_qemu
from katapod.vmm.spec import VmSpec

if TYPE_CHECKING:
    from katapod.model.inspection import OptionPart

__all__ = ["Qemu"]

NICS_MAX = 8  # of a pod; their slots are the first bridge's last, and disks take them when all others are taken
TO_THE_GUEST = ("-append", "-initrd", "-smp", "-m ", "-chardev", "-mon", "-pidfile")


class Qemu(Struct, frozen=True):
    name: str = "QEMU"

    @property
    def judge(self) -> Judge:
        from katapod.vmm.qemu.judge import QemuJudge  # for boots that fail

        return QemuJudge()

    def program(self, config: Config) -> str:
        return config.qemu.path

    def guest(self, config: Config) -> tuple[Path, Path]:
        return Path(config.qemu.kernel), Path(config.qemu.initrd)

    def guest_params(self, config: Config) -> tuple[str, ...]:
        return config_kernel_params(config, config.qemu.kernel_params)

    def options(self, config: Config) -> QemuOptions:
        qemu = config.qemu
        return QemuOptions(
            memory_slots=qemu.memory_slots,
            machine_accelerators=",".join(
                part.strip() for part in qemu.machine_accelerators.split(",") if part.strip()
            ),
            seccomp_sandbox=qemu.seccompsandbox,
            bridges=min(qemu.default_bridges, BRIDGES_MAX),
            root_ports=qemu.pcie_root_port,
            memory_offset_mib=qemu.memory_offset,
            iothreads=qemu.indep_iothreads or int(qemu.enable_iothreads),
            firmware=qemu.firmware,
            io_uring=qemu.block_device_aio == "io_uring",
            extra_monitor=qemu.extra_monitor_socket if qemu.enable_debug else "",
        )

    def capabilities(self, spec: VmSpec) -> Capabilities:
        share, *others = BRIDGE_SLOTS
        return Capabilities(
            disk_slots=(*others[:-NICS_MAX], *more_bridge_slots(options_of(spec).bridges), *others[-NICS_MAX:]),
            nic_slots=tuple(reversed(others[-NICS_MAX:])),
            share_slot=share,
            own_user=True,
            more_slots=f"raise default_bridges in configuration.toml, at most to {BRIDGES_MAX}",
        )

    def describe(self, spec: VmSpec) -> str:
        return plan_qemu(spec).describe()

    def describe_for_host(self, spec: VmSpec) -> str:
        lines = self.describe(spec).splitlines()
        return "\n".join(line for line in lines if not line.strip().startswith(TO_THE_GUEST))

    def files(self, spec: VmSpec) -> tuple[str | Path, ...]:
        return tuple(path for path in (spec.program, spec.kernel, options_of(spec).firmware) if path != "")

    def kernel_params(self, spec: VmSpec) -> str:
        return " ".join(plan_kernel_params(spec))

    def explain(self, command: Sequence[str]) -> "tuple[OptionPart, ...]":
        from katapod.vmm.qemu.explain import explain_command_line  # for people who look on

        return explain_command_line(command)

    def kernel_parameters_in(self, command: Sequence[str]) -> str:
        from katapod.vmm.qemu.explain import word_after

        return word_after(command, "-append")

    def start(
        self, spec: VmSpec, logs: VmmLogs, *, given: Mapping[Handed, int] | None = None, netns: Path | None = None
    ) -> AbstractAsyncContextManager[QemuProcess]:
        slots = {FdSlot[handed.name]: fd for handed, fd in (given or {}).items()}
        return running_qemu(plan_qemu(spec), logs, given=slots, netns=netns)

    def connect(self, vm_dir: Path, limit_s: float) -> AbstractAsyncContextManager[QemuControl]:
        return connected_qemu(vm_dir, limit_s)
