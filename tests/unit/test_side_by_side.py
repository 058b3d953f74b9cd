"""Work side by side, and work that goes to its end."""

import asyncio
import contextlib
import gc
import os
import socket
import threading
from pathlib import Path

import pytest

from katapod.host.logs import kept_pipe
from katapod.host.loopback import LoopbackListener
from katapod.model.errors import KatapodError
from katapod.sandbox import loopback
from katapod.sandbox.guard import guarded
from katapod.tasks import beside, finish, together


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_together_waits_for_both_however_often_it_is_cancelled(times: int) -> None:
    ended = []

    async def work(name: str) -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            for _ in range(3):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.02)
            ended.append(name)

    task = asyncio.create_task(together(work("one"), work("other")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.01)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(ended) == ["one", "other"]


@pytest.fixture
async def unheeded() -> list[str]:
    """What asyncio says of errors that nobody has asked for."""
    said: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: said.append(context["message"]))
    return said


async def answer(value: int) -> int:
    return value


async def never(error: Exception | None = None) -> int:
    """Until it is cancelled; then it raises `error`, if there is one."""
    try:
        await asyncio.sleep(1000)
    except asyncio.CancelledError:
        if error is not None:
            raise error from None
        raise
    return 0


async def test_together_returns_all_results() -> None:
    assert await together() == ()
    assert await together(*(answer(value) for value in range(5))) == (0, 1, 2, 3, 4)


async def test_together_raises_the_first_failure_and_no_other(unheeded: list[str]) -> None:
    async def fail() -> int:
        raise ValueError("first")

    before = asyncio.all_tasks()
    with pytest.raises(ValueError, match="first"):
        await together(never(), fail(), never(KeyError("a consequence")))
    assert asyncio.all_tasks() == before
    gc.collect()
    assert unheeded == []


@pytest.mark.parametrize("may_fail", [False, True])
async def test_an_error_that_the_block_does_not_ask_for(may_fail: bool, unheeded: list[str]) -> None:
    async with beside(never(KeyError("unheard")), may_fail=may_fail) as task:
        await asyncio.sleep(0)
    del task
    gc.collect()
    assert len(unheeded) == (0 if may_fail else 1)


async def test_a_task_is_named_after_its_work() -> None:
    async with beside(never()) as one, beside(never(), name="other") as other:
        assert (one.get_name(), other.get_name()) == ("never", "other")


@pytest.mark.parametrize("times", [1, 3])
async def test_what_is_to_finish_hears_of_a_cancellation_once(times: int) -> None:
    stop, heard = asyncio.Event(), []

    def on_cancel() -> None:
        heard.append("cancelled")

    task = asyncio.create_task(finish(stop.wait(), on_cancel=on_cancel))
    await asyncio.sleep(0)
    for _ in range(times):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (heard, task.done()) == (["cancelled"], False)
    stop.set()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_guarded_work_has_ended_however_often_it_is_cancelled(times: int) -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            for _ in range(3):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.02)
            ended.append("work")

    death: asyncio.Future[KatapodError] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(guarded(work(), death, "s1"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.01)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["work"]


@pytest.mark.parametrize("times", [0, 1, 2])
async def test_a_listener_that_opens_late_is_closed(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread cannot be cancelled."""
    may_open, opened = threading.Event(), []

    def listen(netns: Path) -> LoopbackListener:
        may_open.wait()
        opened.append(LoopbackListener((socket.socket(),), os.open(os.devnull, os.O_RDONLY)))
        return opened[0]

    monkeypatch.setattr(loopback, "listen_on_loopback", listen)

    async def start() -> None:
        async with loopback.listening_on_loopback(Path("/none")):
            await asyncio.sleep(1000 if times else 0)

    task = asyncio.create_task(start())
    await asyncio.sleep(0.01)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.01)
    may_open.set()
    with pytest.raises(asyncio.CancelledError) if times else contextlib.nullcontext():
        await task
    assert (opened[0].link_fd, opened[0].sockets[0].fileno()) == (-1, -1)


@pytest.mark.parametrize("times", [0, 1, 2, 3])
async def test_what_runs_beside_a_block_has_ended_with_it_however_often_that_is_cancelled(times: int) -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            for _ in range(3):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.02)
            ended.append("work")

    async def block() -> None:
        async with beside(work(), name="work") as task:
            await asyncio.sleep(1000 if times else 0)
        assert task.done()

    task = asyncio.create_task(block())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.01)
    with pytest.raises(asyncio.CancelledError) if times else contextlib.nullcontext():
        await task
    assert ended == ["work"]


async def test_a_log_that_is_cancelled_twice_is_not_kept_on(tmp_path: Path) -> None:
    held: list[int] = []

    async def work() -> None:
        async with kept_pipe(tmp_path / "log", 1000) as pipe:
            held.append(os.dup(pipe.write_end))  # as a program does that does not end
            await asyncio.sleep(1000)

    before = asyncio.all_tasks()
    task = asyncio.create_task(work())
    while not held:  # noqa: ASYNC110 - a turn or two
        await asyncio.sleep(0)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.01)
    with pytest.raises(asyncio.CancelledError):
        await task
    os.close(held[0])
    assert asyncio.all_tasks() == before
