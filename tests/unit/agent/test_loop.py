"""The agent's event loop: waiting, cancelling, children, and failures that must not pass unseen."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from katapod.agent.loop import Cancelled, Event, Future, Lock, Loop, Tasks


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def test_returns_and_raises_what_main_does(loop: Loop) -> None:
    async def good() -> int:
        await loop.sleep(0)
        return 5

    async def bad() -> None:
        await loop.turn()
        raise KeyError("gone")

    assert loop.run(good()) == 5
    with pytest.raises(KeyError):
        loop.run(bad())


def test_readable_wakes_when_there_is_data(loop: Loop) -> None:
    read_end, write_end = os.pipe()
    order: list[str] = []

    async def writer() -> None:
        await loop.sleep(0.01)
        order.append("written")
        os.write(write_end, b"x")

    async def main() -> bytes:
        Tasks(loop, "test").spawn("writer", writer())
        await loop.readable(read_end)
        order.append("read")
        return os.read(read_end, 1)

    assert loop.run(main()) == b"x"
    assert order == ["written", "read"]
    loop.close_fd(read_end)
    os.close(write_end)


def test_readable_gives_up_after_its_time(loop: Loop) -> None:
    read_end, write_end = os.pipe()

    async def main() -> tuple[bool, bool]:
        early = await loop.readable(read_end, 0.01)
        os.write(write_end, b"x")
        return early, await loop.readable(read_end, 60)

    assert loop.run(main()) == (False, True)
    loop.close_fd(read_end)
    os.close(write_end)


def test_a_descriptor_closed_while_waited_for_wakes_the_waiter(loop: Loop) -> None:
    read_end, write_end = os.pipe()

    async def main() -> None:
        waiter = Tasks(loop, "test").spawn("waiter", loop.readable(read_end))
        await loop.turn()
        loop.close_fd(read_end)
        assert await loop.wait_any([waiter], 60)

    loop.run(main())
    os.close(write_end)


def test_reader_and_writer_of_one_descriptor(loop: Loop) -> None:
    import socket

    left, right = socket.socketpair()
    left.setblocking(False)

    async def main() -> bytes:
        reader = Tasks(loop, "test").spawn("reader", loop.readable(left.fileno()))
        await loop.writable(left.fileno())
        assert not reader.done
        right.send(b"y")
        assert await loop.wait_any([reader], 60)
        return left.recv(1)

    assert loop.run(main()) == b"y"
    loop.forget(left.fileno())
    left.close()
    right.close()


def test_edges_report_a_state_once(loop: Loop) -> None:
    read_end, write_end = os.pipe()

    async def main() -> None:
        os.close(write_end)
        assert await loop.next_edge(read_end) & select.EPOLLHUP
        again = Tasks(loop, "test").spawn("again", loop.next_edge(read_end))
        assert not await loop.wait_any([again], 0.05)
        again.cancel()
        await loop.turn()

    loop.run(main())
    loop.close_fd(read_end)


def test_timers_fire_in_order(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although all of them are over by the time that it looks."""
    order: list[int] = []
    now = time.monotonic()

    async def at(number: int, seconds: float) -> None:
        await loop.sleep(seconds)
        order.append(number)

    async def main() -> None:
        tasks = Tasks(loop, "test")
        await_all = [tasks.spawn(str(n), at(n, s)) for n, s in ((2, 0.02), (1, 0.01), (3, 0.03))]
        await loop.turn()
        monkeypatch.undo()
        for task in await_all:
            await task

    monkeypatch.setattr(time, "monotonic", lambda: now)  # one moment for all
    loop.run(main())
    assert order == [1, 2, 3]


def test_cancel_runs_finally_and_stops_the_task(loop: Loop) -> None:
    seen: list[str] = []

    async def work() -> None:
        try:
            await Future()
        except Cancelled:
            seen.append("cancelled")
            raise
        finally:
            seen.append("cleaned")

    async def main() -> None:
        tasks = Tasks(loop, "test")
        task = tasks.spawn("work", work())
        await loop.turn()
        tasks.cancel()
        await loop.turn()
        assert task.done
        assert len(tasks) == 0

    loop.run(main())
    assert seen == ["cancelled", "cleaned"]


def test_an_unexpected_exception_of_a_task_ends_the_run(loop: Loop) -> None:
    async def work() -> None:
        raise ValueError("surprise")

    async def main() -> None:
        Tasks(loop, "owner").spawn("work", work())
        await Future()

    with pytest.raises(ValueError, match="surprise") as caught:
        loop.run(main())
    assert caught.value.__notes__ == ["in task owner/work"]


def test_lock_serves_in_order_and_survives_cancelled_waiters(loop: Loop) -> None:
    lock = Lock()
    order: list[str] = []

    async def hold(name: str) -> None:
        async with lock:
            order.append(name)
            await loop.turn()

    async def main() -> None:
        tasks = Tasks(loop, "test")
        first, second, third = (tasks.spawn(n, hold(n)) for n in ("a", "b", "c"))
        await loop.turn()
        second.cancel()
        for task in (first, third):
            await task

    loop.run(main())
    assert order == ["a", "c"]


def test_event(loop: Loop) -> None:
    event = Event()

    async def main() -> bool:
        task = Tasks(loop, "test").spawn("waiter", event.wait())
        await loop.turn()
        assert not task.done
        event.set()
        await task
        event.clear()
        return event.is_set

    assert loop.run(main()) is False


def _start(code: int) -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(code)
    return pid


def test_child_exit(loop: Loop) -> None:
    async def main() -> Any:
        return await loop.child_exit(_start(7))

    assert os.waitstatus_to_exitcode(loop.run(main())) == 7


def test_an_exit_before_anyone_asked_is_kept_during_a_launch(loop: Loop) -> None:
    async def main() -> Any:
        loop.launch_begins()
        pid = _start(9)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 - the loop must not come first
        await loop.child_exit(_start(0))  # by now both are reaped
        status = loop.adopted_exit(pid)
        loop.launch_ends()
        assert status.done
        return await status

    assert os.waitstatus_to_exitcode(loop.run(main())) == 9


def test_signals_reach_the_handler(loop: Loop) -> None:
    got: list[int] = []
    loop.on_signal = got.append
    old = signal.signal(signal.SIGUSR1, lambda number, frame: None)

    async def main() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        while not got:
            await loop.sleep(0.01)

    loop.run(main())
    signal.signal(signal.SIGUSR1, old)
    assert got == [signal.SIGUSR1]


def test_waiting_costs_no_processor_time(loop: Loop) -> None:
    read_end, write_end = os.pipe()
    wait, waits = loop._wait, 0

    def counted() -> None:
        nonlocal waits
        waits += 1
        wait()

    async def main() -> None:
        os.write(write_end, b"unread")
        await loop.readable(read_end)  # stays readable, but nobody waits for it any more
        await loop.sleep(0.05)

    loop._wait = counted  # type: ignore[method-assign]
    loop.run(main())
    assert waits < 10, "a loop that does not wait looks thousands of times"
    loop.close_fd(read_end)
    os.close(write_end)
