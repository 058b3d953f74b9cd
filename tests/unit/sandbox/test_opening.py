"""The one way to a sandbox on a VMM that runs nothing: what is asked for, each step that fails, hooks, the end."""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec import structs

from katapod.host.state import supervisor_alive
from katapod.model import oci
from katapod.model.config import Config
from katapod.model.errors import AlreadyExists, KatapodError
from katapod.model.ids import ContainerId
from katapod.model.record import ContainerRecord, SandboxRecord, State
from katapod.model.sizing import ContainerLimits
from katapod.observe import management_server
from katapod.plan.cgroup import CgroupPlan
from katapod.plan.virtiofsd import VirtiofsdImplementation
from katapod.rpc.client import TtrpcClient
from katapod.rpc.status import RpcError
from katapod.sandbox import container, machine, opening, planning
from katapod.sandbox import hooks as hooks_module
from katapod.sandbox.client import CONTROL_SERVICE, HoldRequest, connect_control
from katapod.sandbox.container import ContainerPlan
from katapod.sandbox.errors import AgentFailed
from katapod.sandbox.hooks import HookFailed
from katapod.sandbox.opening import open_sandbox
from katapod.sandbox.planning import RootDisk, plan_sandbox
from katapod.sandbox.pod import Pod
from katapod.sandbox.recovery import remove_sandbox
from katapod.sandbox.request import SandboxRequest
from katapod.sandbox.rootfs import GuestRootfs, Rootfs
from katapod.vmm.errors import VmmFailed, VmmRefused
from katapod.vmm.proof import AcceleratorChoice
from katapod.vmm.spec import Accelerator
from kit.stage import Stage, agent_refuses, stage_at, vmm_fails

MIB = 1 << 20
SOCKETS = ("control.sock", "shim-monitor.sock")


class Door:
    """Asks for sandboxes, as the command line and the shim do."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.config = Config()
        self.request = SandboxRequest(ContainerId("s1"), "guest")
        self.told: list[str] = []

    async def open(self, **more: Any) -> Pod:
        servers = (management_server.management_server,)
        return await open_sandbox(
            self.request, self.config, self.stage.store, servers=servers, tell=self.told.append, **more
        )

    def change(self, **fields: Any) -> None:
        self.request = structs.replace(self.request, **fields)

    @property
    def state(self) -> Path:
        return self.stage.store.layout.sandbox("s1").state


async def nothing(*args: Any) -> None:
    """Done."""


@pytest.fixture
async def door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Door]:
    async with stage_at(tmp_path, monkeypatch) as stage:

        async def choice(*args: Any) -> AcceleratorChoice:
            return AcceleratorChoice(Accelerator.TCG, "there is no /dev/kvm", fresh=True)

        async def implementation(program: str) -> VirtiofsdImplementation:
            return VirtiofsdImplementation.RUST

        monkeypatch.setattr(opening, "plan_sandbox", partial(plan_sandbox, vmm=stage.vmm))
        monkeypatch.setattr(opening, "accelerator_for", choice)
        monkeypatch.setattr(opening, "virtiofsd_implementation", implementation)
        yield Door(stage)
        assert not stage.store.layout.sandbox("s1").state.exists()


async def test_open_and_close(door: Door) -> None:
    door.change(labels={"a": "b"}, is_pod=True, limits=ContainerLimits(memory_bytes=64 * MIB))
    pod = await door.open()
    record = door.stage.record
    assert (record.state, record.labels, record.pod, record.supervisor_pid) == (
        State.RUNNING,
        {"a": "b"},
        True,
        os.getpid(),
    )
    assert (record.accelerator, record.auto_remove, record.cgroups) == ("tcg", True, ())
    assert all((door.state / name).is_socket() for name in SOCKETS)
    assert door.told == ["using tcg: there is no /dev/kvm"]
    await pod.close()
    await pod.close()
    assert door.stage.vmm.vm.said[-1] == "stop"


async def test_who_is_connected_is_hung_up_once_all_is_gone(door: Door) -> None:
    """Else a client would wait for as long as this process lives, which may hold other sandboxes."""
    pod = await door.open()
    async with connect_control(door.stage.store, "s1") as client:
        await pod.close()
        await asyncio.wait_for(asyncio.shield(client.connection.closed), 60)
        assert client.record_now() is None


async def test_calls_by_the_control_socket_end_with_the_sandbox(door: Door) -> None:
    pod = await door.open()
    standing_in: Any = SimpleNamespace(container_id="s1", sandbox=pod.sandbox)
    pod.containers["s1"] = standing_in
    client = await TtrpcClient.on_unix_path(str(door.state / "control.sock"), "the supervisor")
    request = msgspec.json.encode(HoldRequest(exec_id="e1"))
    holding = asyncio.create_task(client.call_raw(CONTROL_SERVICE, "Hold", request, None))
    async with asyncio.timeout(60):
        while not pod.sandbox.console.sessions:  # noqa: ASYNC110 - the server has no event for it
            await asyncio.sleep(0.01)
    await pod.close()
    assert pod.sandbox.console.sessions == 0
    with pytest.raises(RpcError):
        await holding
    client.close()


async def test_a_name_that_is_taken(door: Door) -> None:
    pod = await door.open()
    with pytest.raises(AlreadyExists):
        await door.open()
    assert door.stage.record.state is State.RUNNING
    await pod.close()


async def test_the_record_can_stay(door: Door) -> None:
    door.change(auto_remove=False)
    pod = await door.open()
    await pod.close(keep=True, expendable=True)
    assert (door.stage.record.state, door.stage.record.vmm_pid) == (State.STOPPED, 0)
    assert door.stage.vmm.vm.said[-1] == "kill"
    assert not any((door.state / name).exists() for name in SOCKETS)
    await remove_sandbox(door.stage.store, "s1")


async def rested_door(door: Door) -> SandboxRecord:
    """With a record of an earlier run."""
    ended = ContainerRecord("s1", "image", ("sh",), State.STOPPED, started_at=1.0, exit_code=3)
    record = SandboxRecord("s1", 1.0, 1, "b", state=State.STOPPED, containers=(ended,), restarts=2)
    os.close(door.stage.store.create(record))
    door.change(auto_remove=False, again=record)
    return record


async def test_a_sandbox_is_opened_again(door: Door) -> None:
    before = await rested_door(door)
    pod = await door.open()
    record = door.stage.record
    assert (record.state, record.created_at, record.restarts, record.lasting) == (State.RUNNING, 1.0, 2, True)
    assert record.containers == ()
    with pytest.raises(AlreadyExists):
        await door.open()
    await pod.close(keep=True)
    assert before.created_at == door.stage.record.created_at
    await remove_sandbox(door.stage.store, "s1")


@pytest.mark.parametrize("step", ["accelerator_for", "plan_sandbox", "start_sandbox", "control_socket"])
async def test_a_start_again_that_fails_leaves_it_as_it_was(
    step: str, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await rested_door(door)

    def fails(*args: Any, **more: Any) -> Any:
        raise KatapodError("it fails")

    monkeypatch.setattr(opening, step, fails)
    with pytest.raises(KatapodError, match="it fails"):
        await door.open()
    assert door.stage.record == structs.replace(before, error="it fails")
    assert not supervisor_alive(door.stage.store.layout.sandbox("s1"))
    await remove_sandbox(door.stage.store, "s1")


async def test_the_first_disk_is_found_once_the_name_is_taken(door: Door) -> None:
    base = door.stage.root / "base.raw"
    base.write_bytes(bytes(4096))

    async def find() -> RootDisk:
        assert door.stage.record.state is State.CREATING
        return RootDisk("root-1", door.stage.store.layout.sandbox("s1").layers / "c1" / "root.qcow2", base)

    pod = await door.open(root_disk=find)
    assert "attach disk root-1" in door.stage.vmm.vm.said
    await pod.close()


async def test_a_fixed_sandbox_has_room_for_its_container_only(door: Door) -> None:
    limits = ContainerLimits(memory_bytes=64 * MIB)
    static = msgspec.structs.replace(door.config.runtime, static_sandbox_resource_mgmt=True)
    door.config = msgspec.structs.replace(door.config, runtime=static)
    door.change(limits=limits, fixed=True)
    pod = await door.open()
    assert door.stage.vmm.vm.spec.max_mem_mib > door.stage.vmm.vm.spec.mem_mib, "only pods are sized once"
    await pod.close()


@pytest.mark.parametrize("path", [None, "/vc/s1"])
async def test_cgroups_are_on_record_before_they_are_made(
    path: str | None, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def prepare(sandbox_id: str, cgroups_path: str | None, **sizes: Any) -> CgroupPlan | None:
        seen.append((sandbox_id, cgroups_path, sizes["limited"]))
        return None if cgroups_path is None else CgroupPlan((), 1, 1, (Path("/none/kata_s1"),))

    @contextlib.asynccontextmanager
    async def joined(plan: CgroupPlan | None) -> AsyncIterator[None]:
        seen.append((plan is not None, door.stage.record.cgroups))
        yield

    monkeypatch.setattr(planning, "prepare_cgroup", prepare)
    monkeypatch.setattr(machine, "joined_cgroup", joined)
    door.change(cgroups_path=path)
    pod = await door.open()
    await pod.close()
    wanted = (False, ()) if path is None else (True, ("/none/kata_s1",))
    assert seen == [("s1", path, False), wanted]


def breaks(name: str, module: ModuleType = opening) -> Callable[[Door, pytest.MonkeyPatch], None]:
    """A function that raises, whichever kind it is."""

    def broken(*args: Any, **more: Any) -> Any:
        raise KatapodError(f"cannot {name}")

    return lambda door, monkeypatch: monkeypatch.setattr(module, name, broken)


STEPS: dict[str, Callable[[Door, pytest.MonkeyPatch], None]] = {
    **{
        name: breaks(name)
        for name in (
            "size_of",
            "cgroup_for",
            "prepare_attachment",
            "new_record",
            "claimed",
            "virtiofsd_implementation",
            "accelerator_for",
            "plan_sandbox",
            "start_sandbox",
            "control_socket",
            "listening_on_loopback",
            "serving_loopback",
        )
    },
    "management_server": breaks("management_server", management_server),
}


@pytest.mark.parametrize("step", STEPS)
async def test_a_step_that_fails(step: str, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    from katapod.model.net_flags import NetworkRequest

    door.change(cgroups_path="/vc/s1", network=NetworkRequest(name="none"))
    monkeypatch.setattr(machine, "joined_cgroup", lambda plan: contextlib.nullcontext())
    STEPS[step](door, monkeypatch)
    with pytest.raises(KatapodError, match=f"cannot {step}"):
        await door.open()


@pytest.mark.parametrize(
    ("break_it", "kind"),
    [
        (vmm_fails("start", VmmFailed("cannot start")), VmmFailed),
        (vmm_fails("run", VmmRefused("no run")), VmmRefused),
        (agent_refuses("CreateSandbox"), AgentFailed),
    ],
)
async def test_a_machine_that_fails(break_it: Callable[[Stage], None], kind: type[Exception], door: Door) -> None:
    break_it(door.stage)
    with pytest.raises(kind):
        await door.open()


async def test_what_cannot_be_found_is_no_sandbox(door: Door) -> None:
    async def find() -> RootDisk:
        raise KatapodError("cannot pull it")

    with pytest.raises(KatapodError, match="cannot pull it"):
        await door.open(root_disk=find)
    assert door.stage.vmm.machines == []


async def test_a_start_that_is_cancelled(door: Door) -> None:
    reached = asyncio.Event()

    async def stay() -> None:
        reached.set()
        await asyncio.sleep(60)

    door.stage.vmm.agent.before["CreateSandbox"] = stay
    start = asyncio.create_task(door.open())
    await asyncio.wait_for(reached.wait(), 60)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start


# -- hooks


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, object]]:
    """The hooks that were run: (program, status, pid); one that is called /fails does. Files and features of the
    container are nobody's business here."""
    seen: list[tuple[str, str, object]] = []

    async def run(args: object, *, executable: str, input: bytes, **more: Any) -> None:
        state = json.loads(input)
        assert (state["id"], more["cwd"]) in (("s1", Path("/bundle")), ("c2", Path("/bundle")))
        seen.append((executable, state["status"], state.get("pid")))
        if executable == "/fails":
            raise KatapodError("no luck today")

    async def rootfs(*args: Any) -> GuestRootfs:
        return GuestRootfs("/root")

    monkeypatch.setattr(hooks_module, "run", run)
    monkeypatch.setattr(container, "open_rootfs", rootfs)
    monkeypatch.setattr(container, "require_features", nothing)
    return seen


def plan_with(create_runtime: str, container_id: str = "s1", bundle: Path | None = Path("/bundle")) -> ContainerPlan:
    hooks = oci.Hooks(
        prestart=(oci.Hook(path="/pre"),),
        create_runtime=(oci.Hook(path=create_runtime),),
        poststart=(oci.Hook(path="/fails"), oci.Hook(path="/post")),
        poststop=(oci.Hook(path="/stop"),),
    )
    spec = oci.Spec(
        oci_version="1.0.2", process=oci.Process(args=("a",), cwd="/"), root=oci.Root(path="/"), hooks=hooks
    )
    return ContainerPlan(container_id, "", spec, Rootfs(Path("/"), direct=True), bundle=bundle)


async def test_hooks_in_their_order(door: Door, ran: list[tuple[str, str, object]]) -> None:
    pod = await door.open()
    made = await pod.create_container(plan_with("/create"), None)
    pid = pod.sandbox.vm.pid
    assert ran == [("/pre", "created", pid), ("/create", "created", pid)]
    await made.start()
    await made.hooks.started(pid)
    await pod.close()
    await made.hooks.stopped()
    assert ran[2:] == [("/fails", "running", pid), ("/post", "running", pid), ("/stop", "stopped", None)]


async def test_without_a_bundle_there_are_none(door: Door, ran: list[tuple[str, str, object]]) -> None:
    pod = await door.open()
    await pod.create_container(plan_with("/create", bundle=None), None)
    await pod.close()
    assert ran == []


async def test_a_hook_that_fails_ends_the_first_container_with_its_sandbox(
    door: Door, ran: list[tuple[str, str, object]]
) -> None:
    pod = await door.open()
    with pytest.raises(HookFailed, match="cannot run the createRuntime hook /fails of s1: no luck today"):
        await pod.create_container(plan_with("/fails"), None)
    await pod.close()
    assert [name for name, *_ in ran] == ["/pre", "/fails", "/stop"]


async def test_a_hook_that_fails_takes_a_later_container_only(door: Door, ran: list[tuple[str, str, object]]) -> None:
    pod = await door.open()
    with pytest.raises(HookFailed):
        await pod.create_container(plan_with("/fails", "c2"), None)
    assert door.stage.vmm.agent.asked[-2:] == ["SignalProcess", "RemoveContainer"]
    assert (pod.containers, door.stage.record.containers) == ({}, ())
    assert ran[-1][0] == "/stop"
    assert door.stage.record.state is State.RUNNING
    await pod.close()
    assert len(ran) == 3
