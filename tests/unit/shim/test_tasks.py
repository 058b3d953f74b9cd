"""Tasks over the shim's real socket, on a guest whose processes end when a test says so."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from shim_guest_helper import VMM_PID, Shim, bundle_at, shim_at

from katapod.host import mounts
from katapod.model.errors import KatapodError, NoSpace
from katapod.observe.management_server import management_server
from katapod.rpc.status import RpcError, StatusCode
from katapod.shim import execs as execs_module
from katapod.shim import tasks as tasks_module
from katapod.shim.pb import runtime_pb2, task_pb2
from kit.loop_time import until

EXEC = json.dumps({"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}}).encode()


@pytest.fixture
async def shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shim]:
    async with shim_at(tmp_path, monkeypatch) as found:
        yield found


async def add_exec(shim: Shim, exec_id: str = "e1", *, start: bool = False, **fields: Any) -> None:
    await shim.call("Exec", id="c1", exec_id=exec_id, spec={"value": EXEC}, **fields)
    if start:
        await shim.call("Start", id="c1", exec_id=exec_id)


@pytest.mark.parametrize("version", [2, 3])
async def test_a_life_from_create_to_shutdown(shim: Shim, tmp_path: Path, version: int) -> None:
    bundle = bundle_at(tmp_path / "c1")
    created = await shim.call("Create", version=version, id="c1", bundle=str(bundle), terminal=True)
    assert created.pid == VMM_PID
    assert await shim.status() == task_pb2.CREATED
    assert (await shim.call("Start", version=version, id="c1")).pid == VMM_PID
    assert shim.pod.sandbox.rescans == 1, "engines may set up the network between create and start"
    state = await shim.call("State", version=version, id="c1")
    assert (state.id, state.bundle, state.pid, state.status, state.terminal) == (
        *("c1", str(bundle), VMM_PID, task_pb2.RUNNING),
        True,
    )
    assert not state.HasField("exited_at")
    connected = await shim.call("Connect", version=version, id="c1")
    assert (connected.shim_pid, connected.task_pid) == (os.getpid(), VMM_PID)
    assert [each.pid for each in (await shim.call("Pids", id="c1")).processes] == [10]
    await shim.call("Shutdown", id="c1")
    assert not shim.shut_down.is_set(), "a task is left"

    waits = [asyncio.create_task(shim.call("Wait", version=version, id="c1")) for _ in range(3)]
    await until(lambda: "WaitProcess" in shim.guest.calls or shim.guest.processes)
    assert not any(wait.done() for wait in waits)
    shim.guest.processes["c1"].end(7)
    ends = await asyncio.gather(*waits)
    assert {(end.exit_status, end.exited_at.seconds > 1_700_000_000) for end in ends} == {(7, True)}
    state = await shim.call("State", id="c1")
    assert (state.status, state.exit_status, state.exited_at) == (task_pb2.STOPPED, 7, ends[0].exited_at)
    deleted = await shim.call("Delete", version=version, id="c1")
    assert (deleted.pid, deleted.exit_status, deleted.exited_at) == (VMM_PID, 7, ends[0].exited_at)
    assert shim.events.topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    assert shim.tasks.pod is None
    await shim.refused("State", StatusCode.NOT_FOUND, id="c1")
    await shim.call("Shutdown", version=version, id="c1")
    assert shim.shut_down.is_set()


async def test_its_sandbox_answers_on_the_management_socket(shim: Shim, tmp_path: Path) -> None:
    await shim.create()
    (server,) = shim.pod.servers
    assert isinstance(server, partial)
    assert (server.func, server.keywords) == (management_server, {"call_times": (shim.tasks.call_times,)})


@pytest.mark.parametrize(
    "method", ["State", "Start", "Delete", "Pids", "Pause", "Resume", "Kill", "Wait", "Stats", "Update", "ResizePty"]
)
async def test_what_is_asked_of_nobody(shim: Shim, method: str) -> None:
    fields: dict[str, Any] = {"resources": {"value": b"{}"}} if method == "Update" else {}
    assert "cannot find task nobody" in await shim.refused(method, StatusCode.NOT_FOUND, id="nobody", **fields)
    await shim.create(start=True)
    if method not in ("Pids", "Pause", "Resume", "Stats", "Update"):
        said = await shim.refused(method, StatusCode.NOT_FOUND, id="c1", exec_id="nobody")
        assert "cannot find exec nobody of task c1" in said


async def test_what_nobody_serves(shim: Shim) -> None:
    await shim.create()
    for service, method, said in (
        ("containerd.task.v2.Task", "Checkpoint", "cannot checkpoint"),
        ("containerd.task.v3.Task", "Fly", "method Fly"),
        ("containerd.task.v4.Task", "State", "service containerd.task.v4.Task"),
    ):
        with pytest.raises(RpcError, match=said) as caught:
            await shim.client.call_raw(service, method, b"", 60)
        assert caught.value.code is StatusCode.UNIMPLEMENTED
    said = await shim.refused("Create", StatusCode.UNIMPLEMENTED, id="c2", bundle="/b", checkpoint="/c")
    assert "no checkpoints" in said


async def test_states_that_do_not_fit(shim: Shim) -> None:
    bundle = await shim.create()
    refused = StatusCode.FAILED_PRECONDITION
    assert "already" in await shim.refused("Create", StatusCode.ALREADY_EXISTS, id="c1", bundle=str(bundle))
    assert "in state created; needs running" in await shim.refused("Pause", refused, id="c1")
    assert "needs paused" in await shim.refused("Resume", refused, id="c1")
    await shim.refused("Exec", refused, id="c1", exec_id="e1", spec={"value": EXEC})
    await shim.call("Start", id="c1")
    await shim.refused("Start", refused, id="c1")
    assert "in state running" in await shim.refused("Delete", refused, id="c1")
    await shim.call("Pause", id="c1")
    assert await shim.status() == task_pb2.PAUSED
    await shim.refused("Pause", refused, id="c1")
    await shim.refused("Delete", refused, id="c1")
    await shim.call("Resume", id="c1")
    assert await shim.status() == task_pb2.RUNNING
    assert shim.events.topics[-2:] == ["/tasks/paused", "/tasks/resumed"]
    shim.guest.processes["c1"].end(0)
    await shim.call("Wait", id="c1")
    for method in ("Start", "Pause", "Resume"):
        assert "in state stopped" in await shim.refused(method, refused, id="c1")


async def test_kill(shim: Shim) -> None:
    await shim.create(start=True)
    await shim.call("Kill", id="c1", signal=signal.SIGTERM)
    asked = shim.guest.requests["SignalProcess"]
    assert (asked.exec_id, asked.signal) == ("c1", 15)
    await shim.call("Kill", id="c1", signal=signal.SIGUSR1, all=True)
    assert shim.guest.requests["SignalProcess"].exec_id == "", "every process"
    await shim.call("Kill", id="c1", signal=signal.SIGKILL)
    assert (await shim.call("Wait", id="c1")).exit_status == 137
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, 0):
        assert "process already finished" in await shim.refused("Kill", StatusCode.NOT_FOUND, id="c1", signal=number)


async def test_crio_may_stop_what_has_just_ended(shim: Shim) -> None:
    """An error would fail its stop of the pod. Signal 0 asks, and is told."""
    shim.events.for_crio = True
    await shim.create(start=True)
    shim.guest.processes["c1"].end(0)
    await shim.call("Wait", id="c1")
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGQUIT):
        await shim.call("Kill", id="c1", signal=number)
    await shim.refused("Kill", StatusCode.NOT_FOUND, id="c1", signal=0)


async def test_signal_0_asks_whether_a_process_is_there(shim: Shim) -> None:
    """The guest is not asked: CRI-O does so before it rotates a log."""
    await shim.create()
    await shim.call("Kill", id="c1", signal=0)
    await shim.call("Start", id="c1")
    await add_exec(shim)
    await shim.refused("Kill", StatusCode.FAILED_PRECONDITION, id="c1", exec_id="e1", signal=0)
    await shim.call("Start", id="c1", exec_id="e1")
    await shim.call("Kill", id="c1", signal=0)
    await shim.call("Kill", id="c1", exec_id="e1", signal=0)
    assert "SignalProcess" not in shim.guest.calls
    shim.guest.execs[0].end(0)
    await shim.call("Wait", id="c1", exec_id="e1")
    await shim.refused("Kill", StatusCode.NOT_FOUND, id="c1", exec_id="e1", signal=0)
    await shim.refused("Kill", StatusCode.NOT_FOUND, id="c2", signal=0)


async def test_a_pods_own_process_that_sigterm_does_not_end_is_killed(
    shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container is not: its time of grace is the engine's matter."""
    monkeypatch.setattr(tasks_module, "PAUSE_GRACE_S", 0.1)
    await shim.create("pod", pod="pod", start=True)
    await shim.create("w1", pod="pod", start=True)
    await shim.call("Kill", id="w1", signal=signal.SIGTERM)
    await asyncio.sleep(0.3)
    assert shim.events.exits() == {}
    await shim.call("Kill", id="pod", signal=signal.SIGTERM)
    await shim.call("Kill", id="pod", signal=signal.SIGTERM)
    assert (await shim.call("Wait", id="pod")).exit_status == 137


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGRTMIN, signal.SIGKILL])
async def test_a_signal_ends_a_task_that_has_not_started(shim: Shim, number: int) -> None:
    """Its own program, which might handle it, does not run yet."""
    await shim.create()
    waiting = asyncio.create_task(shim.call("Wait", id="c1"))
    for harmless in (signal.SIGWINCH, signal.SIGCONT):
        await shim.call("Kill", id="c1", signal=harmless)
    assert await shim.status() == task_pb2.CREATED
    await shim.call("Kill", id="c1", signal=number)
    assert (await asyncio.wait_for(waiting, 60)).exit_status == 128 + number
    assert shim.guest.requests["SignalProcess"].signal == signal.SIGKILL
    assert shim.events.exits() == {"c1": 128 + number}
    assert "in state stopped" in await shim.refused("Start", StatusCode.FAILED_PRECONDITION, id="c1")
    assert (await shim.call("Delete", id="c1")).exit_status == 128 + number


async def test_a_task_that_never_started(shim: Shim) -> None:
    await shim.create()
    waiting = asyncio.create_task(shim.call("Wait", id="c1"))
    await shim.call("State", id="c1")
    assert (await shim.call("Delete", id="c1")).exit_status == 0
    await waiting
    assert shim.events.topics == ["/tasks/create", "/tasks/delete"]


async def test_create_that_fails_leaves_nothing(shim: Shim, tmp_path: Path) -> None:
    shim.guest.fail["CreateContainer"] = RpcError(StatusCode.INTERNAL, "no room")
    bundle = bundle_at(tmp_path / "c1")
    said = await shim.refused("Create", StatusCode.UNKNOWN, id="c1", bundle=str(bundle))
    assert "no room" in said
    assert shim.tasks.pod is None
    await shim.call("Shutdown", id="c1")
    assert shim.shut_down.is_set()
    shim.guest.fail.clear()
    await shim.call("Create", id="c1", bundle=str(bundle))


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"id": "c1", "bundle": "/no/such/bundle"}, StatusCode.NOT_FOUND, "config.json"),
        ({"id": "c1", "bundle": "/with\0zero"}, StatusCode.INVALID_ARGUMENT, "NUL"),
        ({"id": "../c1", "bundle": "BUNDLE"}, StatusCode.INVALID_ARGUMENT, "slash"),
        (
            {"id": "c1", "bundle": "BUNDLE", "options": {"type_url": "runtimeoptions.v1.Options", "value": b"\xff"}},
            StatusCode.INVALID_ARGUMENT,
            "options cannot be parsed",
        ),
    ],
)
async def test_create_with_nonsense(
    shim: Shim, tmp_path: Path, fields: dict[str, Any], code: StatusCode, said: str
) -> None:
    if fields["bundle"] == "BUNDLE":
        fields = {**fields, "bundle": str(bundle_at(tmp_path / "b"))}
    assert said in await shim.refused("Create", code, **fields)


async def test_an_id_that_would_lead_out_of_its_pod(shim: Shim, tmp_path: Path) -> None:
    await shim.create("pod", pod="pod")
    about = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod"}
    bundle = bundle_at(tmp_path / "other", about)
    assert "slash" in await shim.refused("Create", StatusCode.INVALID_ARGUMENT, id="../../x", bundle=str(bundle))


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("runtimeoptions.v1.Options", "/etc/kata.toml"),
        ("type.googleapis.com/runtimeoptions.v1.Options", "/etc/kata.toml"),
        ("cri.runtimeoptions.v1.Options", "/etc/kata.toml"),
        ("containerd.runc.v1.Options", ""),
        ("", ""),
    ],
)
async def test_options_of_other_runtimes_are_ignored(shim: Shim, url: str, path: str) -> None:
    options = runtime_pb2.Options(config_path="/etc/kata.toml").SerializeToString()
    await shim.create(options={"type_url": url, "value": options})
    assert shim.config_paths == [path]


# execs


async def test_an_exec_from_add_to_delete(shim: Shim) -> None:
    await shim.create(start=True)
    await add_exec(shim, terminal=True)
    state = await shim.call("State", id="c1", exec_id="e1")
    assert (state.exec_id, state.status, state.terminal, state.pid) == ("e1", task_pb2.CREATED, True, VMM_PID)
    await shim.refused("Exec", StatusCode.ALREADY_EXISTS, id="c1", exec_id="e1", spec={"value": EXEC})
    await shim.refused("Kill", StatusCode.FAILED_PRECONDITION, id="c1", exec_id="e1", signal=9)
    await shim.call("ResizePty", id="c1", exec_id="e1", height=40, width=100)
    await shim.call("Start", id="c1", exec_id="e1")
    asked = shim.guest.requests["ExecProcess"].process
    assert (asked.ConsoleSize.Height, asked.ConsoleSize.Width, list(asked.Args)) == (40, 100, ["sh"])
    await shim.refused("Start", StatusCode.FAILED_PRECONDITION, id="c1", exec_id="e1")
    await shim.refused("Delete", StatusCode.FAILED_PRECONDITION, id="c1", exec_id="e1")
    await shim.call("ResizePty", id="c1", exec_id="e1", height=41, width=101)
    assert shim.guest.requests["TtyWinResize"].row == 41
    waits = [asyncio.create_task(shim.call("Wait", id="c1", exec_id="e1")) for _ in range(2)]
    await shim.call("Kill", id="c1", exec_id="e1", signal=9)
    assert {end.exit_status for end in await asyncio.gather(*waits)} == {137}
    assert (await shim.call("Delete", id="c1", exec_id="e1")).exit_status == 137
    await shim.refused("State", StatusCode.NOT_FOUND, id="c1", exec_id="e1")
    assert shim.events.topics[2:] == ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"]
    exit_event = shim.events.told[-1][1]
    assert (exit_event.container_id, exit_event.id) == ("c1", "e1")
    assert await shim.status() == task_pb2.RUNNING


@pytest.mark.parametrize(("exec_id", "spec"), [("e1", b"{"), ("e1", b"{}"), ("", EXEC)])
async def test_an_exec_with_nonsense(shim: Shim, exec_id: str, spec: bytes) -> None:
    await shim.create(start=True)
    await shim.refused("Exec", StatusCode.INVALID_ARGUMENT, id="c1", exec_id=exec_id, spec={"value": spec})


async def test_who_waits_for_an_exec_that_is_deleted_before_its_start_is_answered(shim: Shim) -> None:
    await shim.create(start=True)
    await add_exec(shim)
    waiting = asyncio.create_task(shim.call("Wait", id="c1", exec_id="e1"))
    await shim.call("State", id="c1")
    await shim.call("Delete", id="c1", exec_id="e1")
    async with asyncio.timeout(60):
        await waiting


async def test_who_waits_for_an_exec_that_goes_with_its_task_is_answered(shim: Shim) -> None:
    await shim.create(start=True)
    await add_exec(shim)
    waiting = asyncio.create_task(shim.call("Wait", id="c1", exec_id="e1"))
    await shim.call("State", id="c1")
    await shim.call("Kill", id="c1", signal=9)
    await shim.call("Wait", id="c1")
    await shim.call("Delete", id="c1")
    async with asyncio.timeout(60):
        await waiting


async def test_an_exec_is_started_once(shim: Shim) -> None:
    await shim.create(start=True)
    await add_exec(shim)
    gate = shim.guest.hold["ExecProcess"] = asyncio.Event()
    first = asyncio.create_task(shim.call("Start", id="c1", exec_id="e1"))
    await until(lambda: "ExecProcess" in shim.guest.calls)
    second = asyncio.create_task(shim.call("Start", id="c1", exec_id="e1"))
    await shim.call("State", id="c1")
    gate.set()
    await first
    with pytest.raises(RpcError, match="already being started"):
        await second
    assert len(shim.guest.execs) == 1


async def test_an_exec_that_cannot_start_has_ended(shim: Shim) -> None:
    await shim.create(start=True)
    await add_exec(shim)
    shim.guest.fail["ExecProcess"] = RpcError(StatusCode.NOT_FOUND, "no such program")
    said = await shim.refused("Start", StatusCode.UNKNOWN, id="c1", exec_id="e1")
    assert "no such program" in said
    assert (await shim.call("Wait", id="c1", exec_id="e1")).exit_status == 137
    await shim.call("Delete", id="c1", exec_id="e1")
    assert await shim.status() == task_pb2.RUNNING


# streams


async def test_input_that_is_closed_before_the_start_ends_after_it(shim: Shim, tmp_path: Path) -> None:
    """A client may be done with its input before the process is there to read it."""
    fifo = tmp_path / "in"
    os.mkfifo(fifo)
    await shim.create(stdin=str(fifo))
    holder = os.open(fifo, os.O_RDWR)
    try:
        os.write(holder, b"all of it")
        await shim.call("CloseIO", id="c1", stdin=True)
        await shim.call("Start", id="c1")
        process = shim.guest.processes["c1"]
        async with asyncio.timeout(60):
            await process.input_closed.wait()
        assert process.input == b"all of it"
    finally:
        os.close(holder)


async def test_an_exit_status_needs_no_record(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    await shim.create(start=True)

    def is_full(**changes: object) -> None:
        raise NoSpace("cannot write /run/vc/sbs/c1/persist.json: No space left on device")

    monkeypatch.setattr(shim.pod.sandbox, "save", is_full)
    shim.guest.processes["c1"].end(3)
    assert (await shim.call("Wait", id="c1")).exit_status == 3


async def test_output_that_cannot_be_written_ends_nothing(shim: Shim) -> None:
    await shim.create(stdout="file:///dev/full")
    gate = shim.guest.hold["ReadStdout"] = asyncio.Event()
    await shim.call("Start", id="c1")
    process = shim.guest.processes["c1"]
    process.output = b"nobody keeps this"
    gate.set()
    await until(lambda: shim.guest.calls.count("ReadStdout") > 1 or shim.events.exits())
    assert await shim.status() == task_pb2.RUNNING
    process.end(3)
    assert (await shim.call("Wait", id="c1")).exit_status == 3


@pytest.mark.parametrize("uri", ["binary://[/x", "/with\0zero", "stream+unix:///x"])
async def test_streams_that_make_no_sense(shim: Shim, uri: str) -> None:
    await shim.create(stdout=uri)
    await shim.refused("Start", StatusCode.INVALID_ARGUMENT, id="c1")


# resources


async def test_update(shim: Shim) -> None:
    await shim.create(start=True)
    resources = {"memory": {"limit": 1 << 28}, "cpu": {"quota": 50000, "period": 100000}, "devices": None}
    await shim.call("Update", id="c1", resources={"value": json.dumps(resources).encode()})
    limits = shim.pod.limits["c1"]
    assert (limits.memory_bytes, limits.cpus) == (1 << 28, 0.5)
    assert shim.guest.requests["UpdateContainer"].resources.Memory.Limit == 1 << 28


@pytest.mark.parametrize(
    "value", [b"", b"{", b"[]", b'{"memory": 7}', b'{"devices": [{"type": "\xff"}]}', b"[" * 5000, b'{"cpu": 1e99}']
)
async def test_update_with_nonsense(shim: Shim, value: bytes) -> None:
    await shim.create(start=True)
    assert "resources" in await shim.refused("Update", StatusCode.INVALID_ARGUMENT, id="c1", resources={"value": value})


async def test_update_after_the_pod_has_gone(shim: Shim) -> None:
    await shim.create(start=True)
    await shim.tasks.close_pod()
    await shim.refused("Update", StatusCode.FAILED_PRECONDITION, id="c1", resources={"value": b"{}"})


async def test_stats_come_from_the_guest(shim: Shim) -> None:
    await shim.create(start=True)
    answer = await shim.call("Stats", id="c1")
    assert answer.stats.type_url.startswith("io.containerd.cgroups.v")
    assert shim.guest.requests["StatsContainer"].container_id == "c1"


async def test_out_of_memory_is_told_in_both_ways(shim: Shim) -> None:
    """containerd takes the event, CRI-O looks for the file."""
    bundle = await shim.create(start=True)
    for name in ("nobody", "c1"):
        shim.guest.out_of_memory.put_nowait(name)
    await until(lambda: "/tasks/oom" in shim.events.topics)
    assert (bundle / "oom").exists()
    assert [event.container_id for topic, event in shim.events.told if topic == "/tasks/oom"] == ["c1"]
    for name in ["c1", "no-such"] * 200:  # a guest may make up as many as it likes
        shim.guest.out_of_memory.put_nowait(name)
    await asyncio.sleep(0.3)
    assert shim.guest.calls.count("GetOOMEvent") < 40
    assert shim.events.topics.count("/tasks/oom") < 40


# pods


async def test_containers_of_a_pod(shim: Shim, tmp_path: Path) -> None:
    await shim.create("pod", pod="pod", start=True)
    await shim.create("w1", pod="pod", start=True)
    assert set(shim.pod.limits) == {"w1"}, "a pause container is not counted"
    other = bundle_at(
        tmp_path / "w2", {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "another"}
    )
    said = await shim.refused("Create", StatusCode.FAILED_PRECONDITION, id="w2", bundle=str(other))
    assert "belongs to sandbox another" in said
    shim.guest.processes["w1"].end(0)
    await shim.call("Wait", id="w1")
    await shim.call("Delete", id="w1")
    assert shim.guest.requests["RemoveContainer"].container_id == "w1"
    await shim.call("Shutdown", id="w1")
    assert not shim.shut_down.is_set()
    pod = shim.pod
    shim.guest.processes["pod"].end(0)
    await asyncio.wait_for(pod.closed.wait(), 60)


async def test_a_workload_without_its_pod(shim: Shim, tmp_path: Path) -> None:
    about = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod"}
    bundle = bundle_at(tmp_path / "w1", about)
    said = await shim.refused("Create", StatusCode.FAILED_PRECONDITION, id="w1", bundle=str(bundle))
    assert "does not run here" in said


async def test_the_end_of_a_pod_is_told_of_all_in_it(shim: Shim) -> None:
    await shim.create("pod", pod="pod", start=True)
    await shim.create("w1", pod="pod", start=True)
    await shim.create("w2", pod="pod")
    shim.pod.sandbox.death.set_result(KatapodError("the VMM was killed"))
    await until(lambda: shim.tasks.pod is None)
    assert shim.events.exits() == {"pod": 137, "w1": 137, "w2": 137}
    for container in ("w1", "w2", "pod"):
        assert (await shim.call("Delete", id=container)).exit_status == 137


async def test_what_is_asked_of_a_dead_pod_is_answered_with_the_cause(shim: Shim, tmp_path: Path) -> None:
    await shim.create("pod", pod="pod", start=True)
    await shim.create("w1", pod="pod", start=True)
    shim.pod.sandbox.death.set_result(KatapodError("sandbox pod hangs"))
    await until(lambda: shim.tasks.pod is None)
    about = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod"}
    late = {"id": "w2", "bundle": str(bundle_at(tmp_path / "w2", about))}
    calls: list[tuple[str, StatusCode, dict[str, Any]]] = [
        ("Exec", StatusCode.FAILED_PRECONDITION, {"id": "w1", "exec_id": "e1", "spec": {"value": EXEC}}),
        ("Pause", StatusCode.FAILED_PRECONDITION, {"id": "w1"}),
        ("Update", StatusCode.FAILED_PRECONDITION, {"id": "w1", "resources": {"value": b"{}"}}),
        ("Kill", StatusCode.NOT_FOUND, {"id": "w1", "signal": signal.SIGUSR1}),
        ("Create", StatusCode.FAILED_PRECONDITION, late),
    ]
    for method, code, fields in calls:
        assert (await shim.refused(method, code, **fields)).endswith(": sandbox pod hangs"), method


async def test_tasks_are_deleted_while_their_pod_ends(shim: Shim) -> None:
    await shim.create("pod", pod="pod", start=True)
    await shim.create("w1", pod="pod", start=True)
    pod = shim.pod
    pod.may_close.clear()
    shim.guest.processes["pod"].end(0)
    await asyncio.wait_for(pod.closed.wait(), 60)
    await shim.call("Wait", id="w1")
    deleting = [asyncio.create_task(shim.call("Delete", id=each)) for each in ("w1", "pod")]
    await shim.call("State", id="w1")
    pod.may_close.set()
    await asyncio.gather(*deleting)
    assert shim.tasks.pod is None
    assert shim.tasks.empty


async def test_a_pod_that_does_not_end_well_is_told_of_all_the_same(shim: Shim) -> None:
    await shim.create("pod", pod="pod", start=True)
    await shim.create("w1", pod="pod")
    pod = shim.pod
    pod.close_error = KatapodError("cannot remove all of it")
    pod.sandbox.death.set_result(KatapodError("the VMM was killed"))
    await until(lambda: shim.tasks.pod is None)
    assert shim.events.exits() == {"pod": 137, "w1": 137}


async def test_a_delete_that_fails_half_way_is_called_again(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines do until it succeeds: it takes up what is left."""
    await shim.create("pod", pod="pod", start=True)
    await shim.create("w1", pod="pod")
    unmount = mounts.unmount_below
    failures: list[Exception] = [KatapodError("cannot unmount it: busy"), OSError(16, "busy", "/x")]

    def fails(directory: Path) -> None:
        if failures:
            raise failures.pop(0)
        unmount(directory)

    shim.tasks.find("w1").rootfs = shim.folder / "rootfs"
    monkeypatch.setattr(tasks_module, "unmount_below", fails)
    assert "cannot unmount it" in await shim.refused("Delete", StatusCode.UNKNOWN, id="w1")
    assert await shim.refused("Delete", StatusCode.UNKNOWN, id="w1") == "Delete failed: /x: busy"
    await shim.call("Delete", id="w1")
    await shim.refused("State", StatusCode.NOT_FOUND, id="w1")
    pod = shim.pod
    pod.close_error = KatapodError("cannot remove all of pod")
    await shim.call("Kill", id="pod", signal=9)
    await until(lambda: shim.tasks.pod is None)
    assert "cannot remove all of pod" in await shim.refused("Delete", StatusCode.UNKNOWN, id="pod")
    pod.close_error = None
    await shim.call("Delete", id="pod")
    assert shim.tasks.empty
    assert shim.events.topics.count("/tasks/delete") == 2


async def test_a_task_is_deleted_once(shim: Shim) -> None:
    await shim.create("pod", pod="pod", start=True)
    await shim.create("w1", pod="pod")
    gate = shim.guest.hold["RemoveContainer"] = asyncio.Event()
    first = asyncio.create_task(shim.call("Delete", id="w1"))
    await until(lambda: "RemoveContainer" in shim.guest.calls)
    second = asyncio.create_task(shim.call("Delete", id="w1"))
    await shim.call("State", id="w1")
    gate.set()
    await first
    with pytest.raises(RpcError) as caught:
        await second
    assert caught.value.code is StatusCode.NOT_FOUND
    assert shim.events.topics.count("/tasks/delete") == 1


# containerd goes away and comes back


@pytest.mark.parametrize("method", ["StartContainer", "PauseContainer", "RemoveContainer"])
async def test_what_was_begun_for_a_client_that_has_gone_is_finished(shim: Shim, method: str) -> None:
    await shim.create("pod", pod="pod", start=True)
    await shim.create("w1", pod="pod", start=method == "PauseContainer")
    gate = shim.guest.hold[method] = asyncio.Event()
    client = await shim.connect()
    call = {"StartContainer": "Start", "PauseContainer": "Pause", "RemoveContainer": "Delete"}[method]
    before = shim.guest.calls.count(method)
    asked = asyncio.create_task(shim.call(call, via=client, id="w1"))
    await until(lambda: shim.guest.calls.count(method) > before)
    client.close()
    with pytest.raises(RpcError):
        await asked
    await shim.call("State", id="pod")
    gate.set()
    topic = {"Start": "/tasks/start", "Pause": "/tasks/paused", "Delete": "/tasks/delete"}[call]
    await until(lambda: any(t == topic and e.container_id == "w1" for t, e in shim.events.told))
    if call == "Delete":
        await shim.refused("State", StatusCode.NOT_FOUND, id="w1")
    else:
        assert await shim.status("w1") == {"Start": task_pb2.RUNNING, "Pause": task_pb2.PAUSED}[call]


async def test_waits_of_a_client_that_has_gone_are_forgotten(shim: Shim) -> None:
    await shim.create(start=True)
    client = await shim.connect()
    waiting = asyncio.create_task(shim.call("Wait", via=client, id="c1"))
    await shim.call("State", via=client, id="c1")
    client.close()
    with pytest.raises(RpcError):
        await waiting
    shim.guest.processes["c1"].end(0)
    assert (await shim.call("Wait", id="c1")).exit_status == 0


async def test_the_processes_of_a_task(shim: Shim) -> None:
    """By their numbers in the guest; that of an exec with the engine's id. With upstream's agent the VMM for all."""
    await shim.create(start=True)
    await add_exec(shim, start=True)
    main, other = (await shim.call("Pids", id="c1")).processes
    assert (main.pid, main.info.type_url) == (10, "")
    assert (other.pid, other.info.type_url) == (11, "containerd.runc.v1.ProcessDetails")
    assert runtime_pb2.ProcessDetails.FromString(other.info.value).exec_id == "e1"
    shim.guest.fail["Processes"] = RpcError(StatusCode.UNIMPLEMENTED, "")
    assert [process.pid for process in (await shim.call("Pids", id="c1")).processes] == [VMM_PID]
    shim.guest.processes["c1"].end(0)
    await shim.call("Wait", id="c1")
    assert not (await shim.call("Pids", id="c1")).processes


async def test_what_an_exec_leaves_in_the_background_is_carried_on(
    shim: Shim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exit is told when it ends, with its own output before; the stream ends when the last writer closes it."""
    monkeypatch.setattr(execs_module, "EXEC_DRAIN_S", 300.0)  # it is the stream's end that ends it
    await shim.create(start=True)
    out = tmp_path / "out"
    await add_exec(shim, stdout=f"file://{out}")
    await shim.call("Start", id="c1", exec_id="e1")
    process = shim.guest.execs[0]
    process.say(b"own\n")
    process.end(3)
    async with asyncio.timeout(60):
        assert (await shim.call("Wait", id="c1", exec_id="e1")).exit_status == 3
    assert out.read_bytes() == b"own\n"
    assert shim.events.exits() == {"e1": 3}
    process.say(b"late\n")
    await until(lambda: out.read_bytes() == b"own\nlate\n")
    deleting = asyncio.create_task(shim.call("Delete", id="c1", exec_id="e1"))
    process.say(b"last\n", last=True)
    async with asyncio.timeout(60):
        assert (await deleting).exit_status == 3
    assert out.read_bytes() == b"own\nlate\nlast\n"
    assert shim.events.topics.count("/tasks/exit") == 1


async def test_a_deleted_exec_does_not_wait_for_its_background(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execs_module, "EXEC_DRAIN_S", 0.1)
    await shim.create(start=True)
    await add_exec(shim, start=True)
    shim.guest.execs[0].say(b"x")
    shim.guest.execs[0].end(0)
    await shim.call("Wait", id="c1", exec_id="e1")
    async with asyncio.timeout(60):
        await shim.call("Delete", id="c1", exec_id="e1")
