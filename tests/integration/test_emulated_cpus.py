"""Several emulated virtual CPUs, whose kernel patches its code while they run it."""

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace
from tiny_guest_helper import make_initrd
from vm_helper import needs_vm, vm_spec

from katapod.host.logs import read_tail
from katapod.vmm.protocol import VmmLogs
from katapod.vmm.qemu.command_line import plan_qemu
from katapod.vmm.qemu.process import running_qemu
from katapod.vmm.spec import Accelerator

pytestmark = [*needs_vm, pytest.mark.qemu("emulation")]

HANGS_S = 600.0  # of some ten that it takes
PATCH = """
(while :; do /bin/true; done) &
(while :; do /bin/true; done) &
for round in $(seq 100); do
  echo 1 > /proc/sys/kernel/sched_schedstats
  echo 0 > /proc/sys/kernel/sched_schedstats
done
echo "PATCHED BESIDE $(nproc)"
reboot -f
"""
"""The setting is a static key, read at each switch of tasks. With QEMU 7.2 and a thread for each virtual CPU, guests
mostly hung before the fiftieth round."""


@pytest.mark.timeout(HANGS_S + 60)
async def test_a_kernel_patches_code_that_another_cpu_runs(tmp_path: Path) -> None:
    spec = replace(
        vm_spec(tmp_path / "vm", initrd=make_initrd(tmp_path, PATCH, ())),
        accelerator=Accelerator.TCG,
        vcpus=2,
        max_vcpus=2,
    )
    logs = VmmLogs(tmp_path / "console.log", tmp_path / "vmm.log")
    async with running_qemu(plan_qemu(spec), logs) as vm:
        await vm.run()
        await asyncio.wait_for(vm.wait_end(), HANGS_S)
    assert "PATCHED BESIDE 2" in read_tail(logs.console)
