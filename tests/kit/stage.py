"""A stage for sandboxes on the fake VMM: all is real but the VMM, the agent, virtiofsd and the mounts of the share.

After each test nothing may be left: tasks, descriptors, directories.
"""

import asyncio
import contextlib
import gc
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from katapod.host.state import StateStore
from katapod.model.errors import KatapodError
from katapod.model.record import SandboxRecord
from katapod.plan.virtiofsd import VirtiofsdImplementation, VirtiofsdPlan
from katapod.rpc.status import RpcError, StatusCode
from katapod.sandbox import guard, health, lifecycle, machine, share
from katapod.sandbox.lifecycle import Sandbox, start_sandbox
from katapod.sandbox.planning import RootDisk, SandboxPlan
from katapod.vmm.spec import Accelerator, VmSpec
from katapod.vmm.template import TemplateLimits, plan_template
from kit.fake_vmm import FakeShare, FakeVmm
from kit.library import layout_below
from kit.loop_time import until

__all__ = ["REFUSED", "Stage", "agent_is_silent", "agent_refuses", "held", "share_fails", "stage_at", "vmm_fails"]

LIMITS = TemplateLimits(max_age_s=600.0, max_uses=10, unused_s=600.0)


@dataclass
class Stage:
    """What a sandbox is started with."""

    store: StateStore
    root: Path
    vmm: FakeVmm = field(default_factory=FakeVmm)
    shares: list[FakeShare] = field(default_factory=list)
    share_fails: Exception | None = None
    locks: list[int] = field(default_factory=list)

    def plan(self, *, template: bool = False, root_disk: bool = True, mem_mib: int = 256) -> SandboxPlan:
        paths = self.store.layout.sandbox("s1")
        vm = VmSpec("s1", "u", "/none", Path("/k"), Path("/i"), Accelerator.TCG, mem_mib, 1024, 1, 2, paths.vm)
        base = self.root / "base.raw"
        base.write_bytes(bytes(4096))
        return SandboxPlan(
            record=SandboxRecord("s1", created_at=1.0, supervisor_pid=os.getpid(), boot_id="b"),
            vm=vm,
            virtiofsd=VirtiofsdPlan("/none", VirtiofsdImplementation.RUST, paths.shared, "auto"),
            hostname="guest",
            dns=(),
            shm_size_bytes=1 << 20,
            agent_timeout_s=60.0,
            template=plan_template(self.vmm, vm, [], self.root / "templates", LIMITS, mem_mib=256)
            if template
            else None,
            root_disk=RootDisk("root-1", paths.layers / "c1" / "root.qcow2", base) if root_disk else None,
            vmm=self.vmm,
        )

    async def open(self, plan: SandboxPlan | None = None) -> Sandbox:
        plan = plan or self.plan()
        self.locks.append(self.store.create(plan.record))
        return await start_sandbox(plan, self.store)

    @property
    def record(self) -> SandboxRecord:
        """As a fresh process reads it."""
        return StateStore(self.store.layout).read("s1")

    def directories(self) -> list[Path]:
        paths = self.store.layout.sandbox("s1")
        return [path for path in (paths.vm, paths.share, paths.layers) if path.exists()]


def held() -> tuple[list[str], set[str]]:
    fds = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            fds.append(os.readlink(f"/proc/self/fd/{number}"))
    current = asyncio.current_task()
    return sorted(fds), {task.get_name() for task in asyncio.all_tasks() if task is not current}


@contextlib.asynccontextmanager
async def stage_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    found = Stage(StateStore(layout_below(tmp_path)), tmp_path)

    @contextlib.asynccontextmanager
    async def running_share(*args: Any) -> AsyncIterator[FakeShare]:
        if found.share_fails is not None:
            raise found.share_fails
        daemon = FakeShare()
        found.shares.append(daemon)
        try:
            yield daemon
        finally:
            daemon.released = True

    def export(mounts: Path, shared: Path) -> None:
        mounts.mkdir(parents=True)
        shared.mkdir()

    monkeypatch.setattr(share, "running_virtiofsd", running_share)
    monkeypatch.setattr(lifecycle, "export_directory", export)
    monkeypatch.setattr(machine, "VMM_END_S", 0.05)
    monkeypatch.setattr(machine, "VMM_SEEN_S", 0.03)
    monkeypatch.setattr(guard, "CAUSE_LIMIT_S", 0.1)
    monkeypatch.setattr(health, "CAUSE_LIMIT_S", 0.1)
    before = held()
    yield found
    for lock in found.locks:
        os.close(lock)
    gc.collect()  # a socket that nobody closed is told of
    with contextlib.suppress(TimeoutError):  # told of by what is held
        await until(lambda: held() == before)  # transports are closed some turns of the loop later
    assert held() == before
    assert found.directories() == []
    assert all(vm.returncode is not None and vm.stopping for vm in found.vmm.machines)
    assert all(each.released for each in found.shares)


REFUSED = RpcError(StatusCode.INTERNAL, "no")


def vmm_fails(call: str, error: Exception) -> Callable[[Stage], None]:
    return lambda stage: stage.vmm.fails.update({call: error})


def agent_refuses(method: str) -> Callable[[Stage], None]:
    return lambda stage: stage.vmm.agent.refuses.update({method: REFUSED})


def agent_is_silent(method: str) -> Callable[[Stage], None]:
    return lambda stage: stage.vmm.agent.silent.add(method)


def share_fails(stage: Stage) -> None:
    stage.share_fails = KatapodError("cannot run virtiofsd")
