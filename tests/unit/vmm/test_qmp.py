"""The QMP client against a scripted monitor on a socket pair."""

import asyncio
import contextlib
import gc
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from katapod.vmm.errors import VmmLinkBroken, VmmRefused
from katapod.vmm.qemu.hotplug import HotplugPlan, QmpStep
from katapod.vmm.qemu.qmp import LINE_MAX, QmpClient
from kit.loop_time import LoopClock, until

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": ["oob"]}}


class NotThere(Exception):
    """In `answers`: no device of that id."""


class Monitor:
    """QEMU's side. `answers` maps a command to its `return` value, or to an Exception to refuse it with."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.commands: list[tuple[str, Any]] = []
        self.answers: dict[str, Any] = {}
        self.silent: set[str] = set()

    def say(self, message: Any) -> None:
        self.writer.write(json.dumps(message).encode() + b"\r\n")

    async def serve(self) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await self.reader.readline():
                message = json.loads(line)
                command = message["execute"]
                self.commands.append((command, message.get("arguments")))
                if command in self.silent:
                    continue
                self.reply(message["id"], self.answers.get(command, {}))

    async def heard(self, command: str) -> None:
        """Wait until we were asked for `command`."""
        await until(lambda: command in [name for name, _ in self.commands])

    def reply(self, number: int, answer: Any) -> None:
        if isinstance(answer, Exception):
            kind = "DeviceNotFound" if isinstance(answer, NotThere) else "GenericError"
            self.say({"id": number, "error": {"class": kind, "desc": str(answer)}})
        else:
            self.say({"id": number, "return": answer})


Opened = tuple[QmpClient, Monitor]


@pytest.fixture
async def opened() -> AsyncIterator[Opened]:
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(str(context)))
    ours, theirs = socket.socketpair()
    monitor = Monitor(*await asyncio.open_unix_connection(sock=theirs))
    monitor.say(GREETING)
    serving = asyncio.create_task(monitor.serve())
    client = await QmpClient.open(ours, limit_s=60)
    try:
        yield client, monitor
    finally:
        await client.close()
        monitor.writer.close()
        await serving
        await asyncio.sleep(0)
        gc.collect()
        assert complaints == []


async def test_negotiates_and_runs_commands(opened: Opened) -> None:
    client, monitor = opened
    monitor.answers["query-status"] = {"status": "running"}
    assert await client.execute("query-status") == {"status": "running"}
    assert await client.execute("stop", {"x": [1]}) == {}
    assert monitor.commands == [("qmp_capabilities", None), ("query-status", None), ("stop", {"x": [1]})]


async def test_a_refusal(opened: Opened) -> None:
    client, monitor = opened
    monitor.answers["cont"] = ValueError("no guest")
    with pytest.raises(VmmRefused, match="cannot cont: QEMU says: no guest"):
        await client.execute("cont")
    assert await client.execute("stop") == {}


async def test_replies_in_any_order(opened: Opened) -> None:
    client, monitor = opened
    monitor.silent |= {"a", "b"}
    calls = [asyncio.create_task(client.execute(name)) for name in ("a", "b")]
    await monitor.heard("b")
    monitor.reply(3, "second")
    monitor.reply(2, "first")
    assert await asyncio.gather(*calls) == ["first", "second"]


async def test_a_late_reply_goes_nowhere(opened: Opened) -> None:
    client, monitor = opened
    monitor.silent.add("slow")
    with pytest.raises(VmmLinkBroken, match=r"cannot slow: QEMU did not answer within 0\.05 s"):
        await client.execute("slow", limit_s=0.05)
    monitor.reply(2, "late")
    monitor.reply(99, "never asked")
    assert await client.execute("stop") == {}


async def test_an_answer_that_has_come_counts_although_we_were_too_busy_to_see_it(opened: Opened) -> None:
    client, monitor = opened
    clock = LoopClock()
    monitor.silent.add("slow")
    call = asyncio.create_task(client.execute("slow", limit_s=1000))
    await monitor.heard("slow")
    monitor.reply(2, "in time")
    clock.pass_time(1000)  # the loop finds the answer and the end of the time at once
    assert await call == "in time"
    work = asyncio.create_task(client.unplug(_plan("node", "device"), limit_s=1000))
    await monitor.heard("del-device")
    await until(lambda: not client._waiting)  # now it waits for the guest
    monitor.say({"event": "DEVICE_DELETED", "data": {"device": "device", "path": "/machine/x"}})
    clock.pass_time(1000)
    await work
    assert monitor.commands[-1][0] == "del-node"


async def test_events_go_to_who_waits_for_them(opened: Opened) -> None:
    client, monitor = opened
    first = client.expect("DEVICE_DELETED", lambda data: data.get("device") == "d1")
    other = client.expect("SHUTDOWN")
    monitor.say({"event": "DEVICE_DELETED", "data": {"path": "/x"}, "timestamp": {"seconds": 1, "microseconds": 2}})
    monitor.say({"event": "DEVICE_DELETED", "data": {"device": "d1", "path": "/x"}, "timestamp": {}})
    async with asyncio.timeout(60):
        assert (await first)["device"] == "d1"
    assert not other.done()
    monitor.say({"event": "SHUTDOWN"})
    async with asyncio.timeout(60):
        await other


@pytest.mark.parametrize(
    "line",
    [
        b"not json\r\n",
        b"[1]\r\n",
        b'{"id": "x"}\r\n',
        b'{"event": "DEVICE_DELETED", "data": 5}\r\n',
        b'{"event": "DEVICE_DELETED", "data": "text"}\r\n',
        b"x" * (LINE_MAX + 10),
        b'{"return": {}',
        b'{"return": ' + b"[" * 100_000 + b"\r\n",
    ],
)
async def test_a_monitor_that_speaks_nonsense_fails_every_waiter(opened: Opened, line: bytes) -> None:
    client, monitor = opened
    monitor.silent.add("a")
    call = asyncio.create_task(client.execute("a", limit_s=60))
    event = client.expect("DEVICE_DELETED", lambda data: data.get("device") == "d1")
    monitor.writer.write(line)
    monitor.writer.write_eof()
    async with asyncio.timeout(60):
        with pytest.raises(VmmLinkBroken, match="the link to QEMU broke"):
            await call
        with pytest.raises(VmmLinkBroken):
            await event
    with pytest.raises(VmmLinkBroken, match="cannot stop: "):
        await client.execute("stop")


async def test_a_closed_monitor_fails_every_waiter(opened: Opened) -> None:
    client, monitor = opened
    monitor.silent.add("a")
    call = asyncio.create_task(client.execute("a", limit_s=60))
    await monitor.heard("a")
    monitor.writer.close()
    async with asyncio.timeout(60):
        with pytest.raises(VmmLinkBroken, match="QEMU closed its monitor"):
            await call


async def test_an_event_to_be_waited_for_after_the_link_broke(opened: Opened) -> None:
    client, _ = opened
    await client.close()
    async with asyncio.timeout(60):
        with pytest.raises(VmmLinkBroken):
            await client.expect("SHUTDOWN")


async def test_close_twice(opened: Opened) -> None:
    client, _ = opened
    await client.close()
    await client.close()


async def test_close_does_not_wait_for_a_monitor_that_reads_nothing() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(json.dumps(GREETING).encode() + b"\n" + b'{"id": 1, "return": {}}\n')
    client = await QmpClient.open(ours, limit_s=60)
    with pytest.raises(VmmLinkBroken, match="did not answer"):
        await client.execute("x", {"data": "x" * 2_000_000}, limit_s=0.05)
    async with asyncio.timeout(60):
        await client.close()
    theirs.close()


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


async def _nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0)


def _words(text: bytes) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(text)

    return talk


async def _greeting_alone(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b'{"QMP": {}}\n')
    await reader.readline()
    LoopClock().pass_time(1000)


async def _hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


@pytest.mark.parametrize(
    ("talk", "cause"),
    [
        (_nothing, "no greeting in time"),
        (_hang_up, "closed its monitor before it greeted"),
        (_words(b"{}\n"), "does not greet"),
        (_words(b"qemu: hello\n"), "JSON"),
        (_words(b"x" * (LINE_MAX + 10)), "limit|chunk"),
        (_words(b'{"QMP": {}}\n{"id": 1, "error": {"class": "CommandNotFound", "desc": "no"}}\n'), "QEMU says: no"),
        (_greeting_alone, "did not answer within"),
    ],
)
async def test_a_monitor_that_does_not_open(talk: Talk, cause: str) -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    talking = asyncio.create_task(talk(reader, writer))
    with pytest.raises(VmmLinkBroken, match=cause):
        await QmpClient.open(ours, limit_s=0.05 if talk is _nothing else 1000)
    await talking
    writer.close()
    assert ours.fileno() == -1
    await asyncio.sleep(0)


def _plan(*names: str) -> HotplugPlan:
    return HotplugPlan(
        what="a device",
        steps=tuple(QmpStep(f"add-{name}", {"id": name}) for name in names),
        undo=tuple(QmpStep(f"del-{name}", {"id": name}) for name in reversed(names)),
        device_id=names[-1],
    )


@pytest.mark.parametrize(("fails", "undone"), [("a", []), ("b", ["del-a"]), ("c", ["del-b", "del-a"])])
async def test_a_plan_that_fails_half_way_is_undone_backwards(opened: Opened, fails: str, undone: list[str]) -> None:
    client, monitor = opened
    monitor.answers[f"add-{fails}"] = ValueError("full")
    monitor.answers["del-b"] = ValueError("an undo that fails does not stop the others")
    with pytest.raises(VmmRefused, match=f"cannot add-{fails}: QEMU says: full"):
        await client.plug(_plan("a", "b", "c"))
    commands = [name for name, _ in monitor.commands]
    assert commands[commands.index(f"add-{fails}") + 1 :] == undone


async def test_unplug_waits_for_the_guest(opened: Opened) -> None:
    client, monitor = opened
    work = asyncio.create_task(client.unplug(_plan("node", "device"), limit_s=60))
    await monitor.heard("del-device")
    assert monitor.commands[-1][0] == "del-device"
    monitor.say({"event": "DEVICE_DELETED", "data": {"device": "device", "path": "/machine/x"}})
    await work
    assert monitor.commands[-1][0] == "del-node"


async def test_unplug_of_what_the_guest_keeps(opened: Opened) -> None:
    client, monitor = opened
    with pytest.raises(VmmRefused, match="cannot unplug a device: the guest did not let go within"):
        await client.unplug(_plan("node", "device"), limit_s=0.05)
    assert monitor.commands[-1][0] == "del-device"
    assert client._watchers == []


async def test_unplug_again_takes_up_what_is_left(opened: Opened) -> None:
    client, monitor = opened
    plan = _plan("node", "device")
    with pytest.raises(VmmRefused, match="did not let go"):
        await client.unplug(plan, limit_s=0.05)
    monitor.answers["del-device"] = ValueError("already in the process of unplug")
    work = asyncio.create_task(client.unplug(plan, limit_s=60))
    monitor.commands.clear()
    await monitor.heard("del-device")
    monitor.answers["del-node"] = ValueError("in use")
    monitor.say({"event": "DEVICE_DELETED", "data": {"device": "device", "path": "/machine/x"}})
    with pytest.raises(VmmRefused, match="in use"):
        await work
    monitor.commands.clear()
    monitor.answers["del-node"] = {}
    await client.unplug(plan, limit_s=60)
    assert [name for name, _ in monitor.commands] == ["del-node"]
    with pytest.raises(VmmRefused, match="already"):  # another device of that name is another matter
        await client.unplug(plan, limit_s=0.05)


async def test_unplug_of_what_another_connection_has_asked_for(opened: Opened) -> None:
    """Its DEVICE_DELETED comes to all connections."""
    client, monitor = opened
    monitor.answers["del-device"] = ValueError("already in the process of unplug")
    work = asyncio.create_task(client.unplug(_plan("node", "device"), limit_s=60))
    await monitor.heard("del-device")
    monitor.say({"event": "DEVICE_DELETED", "data": {"device": "device", "path": "/machine/x"}})
    await work
    assert monitor.commands[-1][0] == "del-node"


@pytest.mark.parametrize("node", [{}, ValueError("no such node")])
async def test_unplug_of_what_another_connection_has_taken_out(opened: Opened, node: Any) -> None:
    client, monitor = opened
    monitor.answers["del-device"] = NotThere("no such device")
    monitor.answers["del-node"] = node
    await client.unplug(_plan("node", "device"), limit_s=60)
    assert [name for name, _ in monitor.commands[1:]] == ["del-device", "del-node"]


async def test_unplug_that_is_refused_leaves_no_watcher(opened: Opened) -> None:
    client, monitor = opened
    monitor.answers["del-device"] = ValueError("not found")
    with pytest.raises(VmmRefused, match="not found"):
        await client.unplug(_plan("node", "device"), limit_s=0.05)
    assert client._watchers == []


async def test_unplug_of_what_stays(opened: Opened) -> None:
    client, monitor = opened
    plan = HotplugPlan(what="256 MiB of memory", steps=(), undo=(QmpStep("device_del", {"id": "m"}),))
    with pytest.raises(VmmRefused, match="it stays until the VM ends"):
        await client.unplug(plan)
    assert [name for name, _ in monitor.commands] == ["qmp_capabilities"]
