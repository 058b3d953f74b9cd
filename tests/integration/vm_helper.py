"""Plans of small VMs for tests, and a probe for what an attempt leaves behind."""

import asyncio
import gc
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from msgspec.structs import replace

from katapod.host.facts import file_identity
from katapod.host.state import StateStore
from katapod.model.config import find_virtiofsd
from katapod.model.config_keys import FactoryConfig
from katapod.model.layout import Layout
from katapod.model.record import SandboxRecord
from katapod.plan.virtiofsd import VirtiofsdImplementation, VirtiofsdPlan
from katapod.sandbox.lifecycle import Sandbox
from katapod.sandbox.planning import SandboxPlan
from katapod.sandbox.recovery import find_leftovers
from katapod.sandbox.vmms import DEFAULT_VMM
from katapod.vmm.qemu.command_line import QemuOptions
from katapod.vmm.qemu.process import QemuProcess
from katapod.vmm.spec import VmSpec
from katapod.vmm.template import TemplateLimits, plan_template
from kit.accel import QEMU_ACCELERATOR, REMEDY
from kit.uids import VM_UID

KERNEL = Path("/var/cache/kata-containers/vmlinuz.container")
INITRD = Path("/var/cache/kata-containers/kata-containers-initrd.img")

QEMU = "/usr/bin/qemu-system-x86_64"
VIRTIOFSD = shutil.which("virtiofsd") or os.path.realpath(find_virtiofsd("") or "virtiofsd")  # QEMU 8's is a link
DIALECT = VirtiofsdImplementation.C if "qemu" in VIRTIOFSD else VirtiofsdImplementation.RUST

needs_vm = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not Path(QEMU).exists() or not Path(VIRTIOFSD).exists(), reason="needs QEMU and virtiofsd"),
]
needs_guest_image = pytest.mark.skipif(not INITRD.exists(), reason="needs a guest image: kata-runtime image build")


def vm_spec(vm_dir: Path, sandbox_id: str = "s1", *, qemu: str = QEMU, initrd: Path = INITRD) -> VmSpec:
    return VmSpec(
        sandbox_id=sandbox_id,
        uuid=str(uuid.uuid4()),
        program=qemu,
        kernel=KERNEL,
        initrd=initrd,
        accelerator=QEMU_ACCELERATOR,
        remedy=REMEDY,
        mem_mib=256,
        max_mem_mib=1024,
        vcpus=1,
        max_vcpus=2,
        vm_dir=vm_dir,
        options=QemuOptions(memory_slots=2),
        uid=VM_UID,
    )


def threads_of(vcpus: int, pid: int) -> int:
    """How many threads of the process run so many virtual CPUs: QEMU before 8.1 emulates them on one (ADR 58)."""
    return 1 if b"thread=single" in Path(f"/proc/{pid}/cmdline").read_bytes() else vcpus


def sandbox_plan(
    layout: Layout,
    sandbox_id: str,
    *,
    qemu: str = QEMU,
    virtiofsd: str = VIRTIOFSD,
    initrd: Path = INITRD,
    agent_timeout_s: float = 60.0,
) -> SandboxPlan:
    paths = layout.sandbox(sandbox_id)
    return SandboxPlan(
        record=SandboxRecord(sandbox_id, created_at=1.0, supervisor_pid=os.getpid(), boot_id="b"),
        vm=vm_spec(paths.vm, sandbox_id, qemu=qemu, initrd=initrd),
        virtiofsd=VirtiofsdPlan(virtiofsd, DIALECT, paths.shared, "auto"),
        hostname="guest",
        dns=(),
        shm_size_bytes=1 << 20,
        agent_timeout_s=agent_timeout_s,
    )


def cloned_plan(layout: Layout, sandbox_id: str) -> SandboxPlan:
    """The same for a clone, where a boot is not what is tested. Its template is where those of users are: it is made by
    the first test that needs it, and stays."""
    plan = sandbox_plan(layout, sandbox_id)
    limits = TemplateLimits(max_age_s=3600.0, max_uses=1000, unused_s=3600.0)
    identities = [file_identity(path) for path in (QEMU, KERNEL, INITRD)]
    root = Path(FactoryConfig().template_path)
    return replace(plan, template=plan_template(DEFAULT_VMM, plan.vm, identities, root, limits, mem_mib=256))


def qemu_of(sandbox: Sandbox) -> QemuProcess:
    """For what only QEMU can be asked."""
    assert isinstance(sandbox.vm, QemuProcess)
    return sandbox.vm


def busybox_rootfs(root: Path, *commands: str) -> Path:
    """Fill a root file system with busybox under these names."""
    for name in ("bin", "proc", "sys", "dev", "tmp", "etc"):
        (root / name).mkdir()
    shutil.copy(shutil.which("busybox") or "/bin/busybox", root / "bin" / "busybox")
    for name in commands:
        (root / "bin" / name).symlink_to("busybox")
    return root


SETTLE_S = 180.0


@dataclass
class Owned:
    """A name taken for a test, given back at its end."""

    store: StateStore
    sandbox_id: str
    lock: int = field(init=False)

    def __enter__(self) -> "Owned":
        self.lock = self.store.create(
            SandboxRecord(self.sandbox_id, created_at=1.0, supervisor_pid=os.getpid(), boot_id="b")
        )
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.lock)

    def left(self) -> list[str]:
        """What is there of the sandbox beside its record and logs. What was killed may be seen for a moment."""
        deadline = time.monotonic() + SETTLE_S
        while (found := self._found()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def _found(self) -> list[str]:
        paths = self.store.layout.sandbox(self.sandbox_id)
        kept = {f"directory {paths.state}", f"directory {paths.data}"}
        return [line for line in find_leftovers(self.store.layout, self.sandbox_id) if line not in kept]


def resources() -> tuple[list[str], set[str]]:
    """Descriptors and tasks of this process."""
    gc.collect()
    fds = []
    for number in os.listdir("/proc/self/fd"):
        try:
            fds.append(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:
            continue  # the listing's own
    current = asyncio.current_task()
    return sorted(fds), {task.get_name() for task in asyncio.all_tasks() if task is not current}


async def settled(ready: Callable[[], bool], limit_s: float = 180.0) -> bool:
    """Whether `ready` comes true within the limit."""
    for _ in range(int(limit_s / 0.02)):
        if ready():
            return True
        await asyncio.sleep(0.02)
    return ready()
