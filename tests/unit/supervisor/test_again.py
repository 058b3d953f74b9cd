"""The whole life of a container that stays, on a VMM that runs nothing: create, start, start again, its policy."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from katapod.host.state import supervisor_alive
from katapod.model.config import Config
from katapod.model.errors import AlreadyExists, InvalidState, KatapodError
from katapod.model.ids import ContainerId
from katapod.model.net_flags import NetworkRequest
from katapod.model.record import SandboxRecord, State
from katapod.model.run_flags import RestartPolicy
from katapod.plan.container_spec import ContainerOptions
from katapod.plan.virtiofsd import VirtiofsdImplementation
from katapod.sandbox import container, opening, share, shared_volumes, task
from katapod.sandbox.client import connect_control
from katapod.sandbox.container import Rootfs
from katapod.sandbox.deletion import delete_sandbox
from katapod.sandbox.endings import end_policy
from katapod.sandbox.lifecycle import Sandbox
from katapod.sandbox.planning import plan_sandbox
from katapod.sandbox.rootfs import GuestRootfs
from katapod.supervisor import restarting
from katapod.supervisor.creating import create_container
from katapod.supervisor.kept import read_kept
from katapod.supervisor.renaming import rename_container
from katapod.supervisor.run import background_streams, own_container
from katapod.supervisor.run_context import RunContext
from katapod.supervisor.run_request import RunRequest
from katapod.vmm.errors import VmmFailed
from katapod.vmm.proof import AcceleratorChoice
from katapod.vmm.spec import Accelerator
from kit.fake_guest import FakeGuest
from kit.fake_vmm import FakeVmm
from kit.stage import Stage, stage_at


class Life:
    """`c1`, as commands have it. `kept`: of each start, whether its layer was to stay."""

    def __init__(self, stage: Stage, config: Config) -> None:
        self.stage = stage
        self.store = stage.store
        self.kept: list[bool] = []
        self.context = RunContext(
            layout=stage.store.layout,
            config_file="",
            load_config=lambda annotations: config,
            image_progress=lambda: nullcontext(None),
            tell=lambda text: None,
            servers=(),
        )

    def asked(self, *command: str, **changes: Any) -> RunRequest:
        plain = RunRequest(
            ContainerId("c1"),
            "",
            Path("/"),
            None,
            ContainerOptions(args=command),
            remove=False,
            interactive=False,
            accel="",
            labels={"a": "b"},
            stop_signal=None,
            network=NetworkRequest(name="none"),
            stop_timeout_s=0,
        )
        return replace(plain, **changes)

    async def run(self, request: RunRequest) -> int:
        return (await own_container(self.context, request, background_streams, lambda container: None)).exit_code

    async def again(self) -> int:
        return await self.run(read_kept(self.store.layout, "c1").again)

    @property
    def record(self) -> SandboxRecord:
        return self.store.read("c1")

    async def until(self, state: State) -> None:
        while state not in self._states():  # noqa: ASYNC110 - it is seen on disk only
            await asyncio.sleep(0.01)

    def _states(self) -> list[State]:
        return [item.state for item in self.record.containers] if self.store.ids() else []


@pytest.fixture
async def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Life]:
    async with stage_at(tmp_path, monkeypatch) as stage:
        stage.vmm = FakeVmm(agent=FakeGuest())
        config = Config()
        config = msgspec.structs.replace(config, katapod=msgspec.structs.replace(config.katapod, network="none"))
        found = Life(stage, config)

        async def choice(*args: Any) -> AcceleratorChoice:
            return AcceleratorChoice(Accelerator.TCG, "there is no /dev/kvm", fresh=False)

        async def implementation(program: str) -> VirtiofsdImplementation:
            return VirtiofsdImplementation.RUST

        async def rootfs(sandbox: Sandbox, container_id: str, source: Rootfs) -> GuestRootfs:
            found.kept.append(source.kept)
            (sandbox.paths.files if source.kept else sandbox.paths.layers / container_id).mkdir(exist_ok=True)
            return GuestRootfs("/root")

        monkeypatch.setattr(opening, "plan_sandbox", partial(plan_sandbox, vmm=stage.vmm))
        monkeypatch.setattr(opening, "accelerator_for", choice)
        for asking in (opening, share):
            monkeypatch.setattr(asking, "virtiofsd_implementation", implementation)
        monkeypatch.setattr(container, "open_rootfs", rootfs)
        monkeypatch.setattr(task, "OOM_WORD_S", 0.02)
        monkeypatch.setattr(shared_volumes, "bind", lambda *args, **more: None)
        monkeypatch.setattr(restarting, "FIRST_S", 0.01)
        yield found
        assert not supervisor_alive(stage.store.layout.sandbox("c1"))
        await delete_sandbox(stage.store, "c1", force=True)
        assert not stage.store.layout.sandbox("c1").data.exists()


async def test_create_start_and_start_again(life: Life) -> None:
    await create_container(life.context, life.asked("false"))
    paths = life.store.layout.sandbox("c1")
    made = life.record
    assert (made.state, made.containers[0].state, made.labels) == (State.CREATED, State.CREATED, {"a": "b"})
    assert life.stage.vmm.machines == []
    with pytest.raises(AlreadyExists, match="the name is taken"):
        await create_container(life.context, life.asked("false"))
    assert life.record == made
    for count in (1, 2):
        assert await life.again() == 1
        record = life.record
        assert (record.state, record.containers[0].exit_code, record.created_at) == (State.STOPPED, 1, made.created_at)
        assert life.store.kept("c1") == record
        assert life.kept == [True] * count
        assert paths.files.exists()
        assert life.stage.vmm.machines[-1].said[-1] == "stop", "the guest is asked to write its files"
    assert len(paths.container_log.read_bytes().splitlines()) == 2


async def test_run_again(life: Life) -> None:
    assert await life.run(life.asked("echo", "x")) == 0
    assert await life.again() == 0
    assert await life.run(life.asked("echo", remove=True, container_id=ContainerId("c2"))) == 0
    assert life.kept == [True, True, False]
    assert life.store.ids() == ["c1"]


async def test_one_that_is_removed_at_its_first_end(life: Life) -> None:
    await create_container(life.context, life.asked("echo", remove=True))
    assert life.record.state is State.CREATED
    assert await life.again() == 0
    assert life.kept == [False]
    assert life.store.ids() == []


async def test_a_start_that_fails(life: Life) -> None:
    await create_container(life.context, life.asked("false"))
    made = life.record
    life.stage.vmm.fails["start"] = VmmFailed("cannot start it")
    with pytest.raises(KatapodError, match="cannot start it"):
        await life.again()
    assert life.record == replace(made, error=life.record.error)
    assert "cannot start it" in life.record.error
    del life.stage.vmm.fails["start"]
    assert await life.again() == 1
    assert life.record.error == ""
    ended = life.record.containers
    life.stage.vmm.fails["run"] = VmmFailed("cannot run it")
    with pytest.raises(KatapodError, match="cannot run it"):
        await life.again()
    assert (life.record.state, life.record.containers) == (State.STOPPED, ended)


async def test_a_command_that_is_not_there(life: Life) -> None:
    """Known once the VM runs: the container stays as it was made."""
    await create_container(life.context, life.asked("nothing"))
    with pytest.raises(KatapodError, match="nothing"):
        await life.again()
    assert life.record.containers[0].state is State.CREATED
    assert "nothing" in life.record.error


async def test_a_start_that_is_broken_off(life: Life) -> None:
    await create_container(life.context, life.asked("false"))
    reached = asyncio.Event()

    async def stay() -> None:
        reached.set()
        await asyncio.sleep(60)

    life.stage.vmm.agent.before["CreateSandbox"] = stay
    start = asyncio.create_task(life.again())
    await asyncio.wait_for(reached.wait(), 60)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    del life.stage.vmm.agent.before["CreateSandbox"]
    assert life.record.state is State.CREATED
    assert await life.again() == 1


async def test_a_policy_until_it_has_had_enough(life: Life) -> None:
    assert await life.run(life.asked("false", restart=RestartPolicy("on-failure", 2))) == 1
    assert (life.record.restarts, life.record.restart, len(life.kept)) == (2, "on-failure:2", 3)
    assert await life.again() == 1, "counted from 0 again"
    assert (life.record.restarts, len(life.kept)) == (2, 6)
    assert life.record.state is State.STOPPED


async def test_a_policy_and_who_kills(life: Life) -> None:
    always = RestartPolicy("always")
    running = asyncio.create_task(life.run(life.asked("sleep", restart=always)))
    await life.until(State.RUNNING)
    life.stage.vmm.vm.end(1)  # its VM has died
    while not life.record.restarts:  # noqa: ASYNC110 - it is seen on disk only
        await asyncio.sleep(0.01)
    await life.until(State.RUNNING)
    async with connect_control(life.store, "c1") as client:
        await client.kill("c1", signal.SIGKILL)
    assert await running == 137
    assert (life.record.stop_asked, life.record.restarts, life.record.state) == (True, 1, State.STOPPED)


async def test_a_policy_that_waits_is_ended_by_a_signal(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarting, "FIRST_S", 3600.0)
    ended: list[bool] = []
    work = own_container(
        life.context,
        life.asked("false", restart=RestartPolicy("always")),
        background_streams,
        lambda started: None,
        on_ended=lambda: ended.append(True),
    )
    running = asyncio.create_task(work)
    while not (ended and life.store.ids() and life.record.restart_at):  # noqa: ASYNC110 - it is seen on disk only
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not await end_policy(life.store, "c1"), "nobody is there any more"
    assert (life.record.restart_at, life.record.stop_asked) == (0, True)


async def test_another_name(life: Life) -> None:
    assert await life.run(life.asked("echo", "x")) == 0
    before = life.record
    new = ContainerId("c2")
    os.close(life.store.create(replace(before, sandbox_id="c3")))
    with pytest.raises(AlreadyExists, match="the name is taken"):
        await rename_container(life.store, ContainerId("c1"), ContainerId("c3"))
    assert life.record == before
    await rename_container(life.store, ContainerId("c1"), new)
    assert life.store.ids() == ["c2", "c3"]
    assert not life.store.layout.sandbox("c1").data.exists()
    assert life.store.layout.sandbox("c2").files.exists()
    found = life.store.read("c2")
    assert (found.containers[0].container_id, found.created_at) == ("c2", before.created_at)
    assert await life.run(read_kept(life.store.layout, "c2").again) == 0
    assert len(life.store.layout.sandbox("c2").container_log.read_bytes().splitlines()) == 2
    lock = life.store.reclaim(life.store.read("c2"))
    with pytest.raises(InvalidState, match="it runs, and its VM has its name"):
        await rename_container(life.store, new, ContainerId("c1"))
    os.close(lock)
    with pytest.raises(InvalidState, match="nothing was kept"):
        await rename_container(life.store, ContainerId("c3"), ContainerId("c1"))
    for name in ("c2", "c3"):
        await delete_sandbox(life.store, name)


async def test_what_cannot_be_created_is_not_there(life: Life) -> None:
    with pytest.raises(KatapodError, match="it is not a directory"):
        await create_container(life.context, life.asked("false", rootfs=Path("/none/such")))
    assert life.store.ids() == []
    assert not life.store.layout.sandbox("c1").data.exists()
