"""The door to other programs, with real ones."""

import asyncio
import gc
import os
import signal
import sys
import threading
import time
from asyncio.unix_events import ThreadedChildWatcher
from collections.abc import Callable
from pathlib import Path

import pytest

from katapod.host import process
from katapod.host.process import ProcessFailed, describe_status, find_program, run, spawn, stop_child
from katapod.model.errors import KatapodError, MissingProgram
from kit.loop_time import LoopClock, until


async def test_output_and_input() -> None:
    done = await run(["sh", "-c", "cat; echo said >&2"], input=b"given")
    assert (done.stdout, done.stderr, done.returncode) == ("given", "said\n", 0)


async def test_a_failure_carries_command_status_and_words() -> None:
    with pytest.raises(ProcessFailed, match="sh failed: exit status 3: it is broken") as caught:
        await run(["sh", "-c", "echo it is broken >&2; exit 3"])
    assert caught.value.command == "sh -c 'echo it is broken >&2; exit 3'"
    assert (await run(["sh", "-c", "exit 3"], check=False)).returncode == 3


async def test_the_environment_is_built_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("LC_ALL", "de_DE")
    done = await run(["env"], env={"MORE": "y"})
    lines = done.stdout.split()
    assert "MORE=y" in lines
    assert "LC_ALL=C.UTF-8" in lines
    assert not any(line.startswith("SECRET") for line in lines)


async def test_a_program_that_does_not_end_is_killed_with_its_children(tmp_path: Path) -> None:
    clock = LoopClock()
    script = f"sleep 1000 & echo $! > '{tmp_path}/pid'; wait"
    task = asyncio.create_task(run(["sh", "-c", script], timeout_s=1000.0))
    pid = int(await content_of(tmp_path / "pid"))
    clock.pass_time(1000)
    with pytest.raises(ProcessFailed, match=r"no end within 1000 s"):
        await task
    await gone(pid)


@pytest.mark.parametrize("how", ["time", "cancelled"])
@pytest.mark.parametrize(
    "script",
    [
        "exec yes",  # more than anybody reads once the time is over
        "exec yes >&2",
        "setsid cat fifo & exec sleep 1000",  # holds the pipes, and is in no group of ours
        "cat > /dev/null & exec sleep 1000",
    ],
)
async def test_what_it_leaves_in_its_pipes_does_not_keep_us(
    tmp_path: Path, script: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "STOP_GRACE_S", 0.2)
    os.mkfifo(tmp_path / "fifo")
    held = os.open(tmp_path / "fifo", os.O_RDWR)
    work = run(["sh", "-c", script], cwd=tmp_path, input=bytes(1 << 20), timeout_s=0.3 if how == "time" else None)
    task = asyncio.create_task(work)
    if how == "cancelled":
        await asyncio.sleep(0.3)
        task.cancel()
    done, _ = await asyncio.wait({task}, timeout=60)
    assert done
    with pytest.raises(ProcessFailed if how == "time" else asyncio.CancelledError):
        task.result()
    (tmp_path / "fifo").unlink()
    os.close(held)  # the end of what reads it, or it does not find it
    await asyncio.sleep(0.05)


async def test_cancelling_kills_it(tmp_path: Path) -> None:
    task = asyncio.create_task(run(["sh", "-c", f"echo $$ > '{tmp_path}/pid'; exec sleep 1000"], timeout_s=None))
    pid = int(await content_of(tmp_path / "pid"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone(pid)


@pytest.mark.parametrize("how", ["time", "cancelled"])
async def test_one_that_has_taken_its_input_and_does_not_end(tmp_path: Path, how: str) -> None:
    clock = LoopClock()
    script = "cat; echo done > read; exec sleep 1000"
    task = asyncio.create_task(run(["sh", "-c", script], cwd=tmp_path, input=b"all of it", timeout_s=1000))
    await content_of(tmp_path / "read")
    if how == "cancelled":
        task.cancel()
    else:
        clock.pass_time(1000)
    with pytest.raises(ProcessFailed if how == "time" else asyncio.CancelledError):
        await task


def test_cancelling_while_it_is_started(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far the start is: no process is left, and asyncio's watcher of it has nothing to complain of."""
    watch_after(monkeypatch, lambda: time.sleep(0.05))

    async def cancelled_after(turns: int) -> None:
        task = asyncio.create_task(run(["/bin/true"]))
        for _ in range(turns):
            await asyncio.sleep(0)
        time.sleep(0.02)  # noqa: ASYNC251 - while nobody looks, it ends
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for turns in range(1, 8):
        asyncio.run(cancelled_after(turns))
    assert caplog.records == []
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("between", [0, 1, 2])
def test_cancelling_again_while_it_is_started(times: int, between: int) -> None:
    async def turn(number: int) -> None:
        for _ in range(number):
            await asyncio.sleep(0)

    async def cancelled_after(turns: int) -> None:
        task = asyncio.create_task(run(["sleep", "1000"]))
        await turn(turns)
        for _ in range(times):
            task.cancel()
            await turn(between)
        with pytest.raises(asyncio.CancelledError):
            await task

    for turns in range(1, 12):
        asyncio.run(cancelled_after(turns))
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


async def test_output_without_end_is_cut() -> None:
    done = await run(["head", "-c", "6000000", "/dev/zero"])
    assert len(done.stdout) == 4 * 1024 * 1024


def test_input_that_nobody_reads(caplog: pytest.LogCaptureFixture) -> None:
    gc.collect()  # what others left
    caplog.clear()
    assert asyncio.run(run(["sleep", "0.1"], input=b"x" * 1_000_000)).returncode == 0
    gc.collect()
    assert caplog.records == []  # asyncio tells here of an exception that nobody took


async def test_a_program_that_is_not_there() -> None:
    with pytest.raises(MissingProgram, match="cannot run /none/such: No such file"):
        await run(["/none/such"])


@pytest.mark.parametrize(("mode", "cause"), [(0o644, "Permission denied"), (0o755, "Exec format error")])
async def test_a_file_that_is_no_program(tmp_path: Path, mode: int, cause: str) -> None:
    """A configuration may name any file."""
    path = tmp_path / "text"
    path.write_bytes(b"\x00\x01 no program")
    path.chmod(mode)
    with pytest.raises(KatapodError, match=f"cannot run .*/text: {cause}"):
        await run([str(path)])


def test_find_program() -> None:
    assert find_program("sh", package="dash").endswith("/sh")
    assert find_program("/bin/sh", package="dash") == "/bin/sh"
    with pytest.raises(MissingProgram, match="cannot run no-such-program: it is not installed") as caught:
        find_program("no-such-program", package="nosuch")
    assert "apt-get install nosuch" in caught.value.hint
    for name in ("/etc/passwd", "/etc"):
        with pytest.raises(MissingProgram, match=f"cannot run {name}: it is not an executable file"):
            find_program(name, package="nosuch")


@pytest.mark.parametrize(
    ("status", "text"),
    [(None, "still running"), (0, "exit status 0"), (-9, "killed by SIGKILL"), (-63, "killed by signal 63")],
)
def test_describe_status(status: int | None, text: str) -> None:
    assert describe_status(status) == text


async def test_a_child_gets_its_descriptors_and_writes_where_told(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    with (tmp_path / "out").open("wb") as out:
        child = await spawn(
            ["sh", "-c", f"echo out; echo passed > /proc/self/fd/{write_end}"], output=out, pass_fds=[write_end]
        )
        os.close(write_end)
        assert await child.process.wait() == 0
    with os.fdopen(read_end, "rb") as handle:
        assert handle.read() == b"passed\n"
    assert (tmp_path / "out").read_bytes() == b"out\n"
    assert child.describe_end() == "exit status 0"
    assert child.argv[0] == "sh"


async def test_stop_softly(tmp_path: Path) -> None:
    child = await spawn(["sleep", "1000"], output=asyncio.subprocess.DEVNULL)
    assert await stop_child(child, grace_s=60) is True
    assert child.describe_end() == "killed by SIGTERM"
    assert await stop_child(child) is True


async def test_stop_hard_when_it_does_not_listen(tmp_path: Path) -> None:
    script = f"trap '' TERM; echo > '{tmp_path}/ready'; while :; do sleep 60; done"
    child = await spawn(["sh", "-c", script], output=asyncio.subprocess.DEVNULL)
    await content_of(tmp_path / "ready")
    assert await stop_child(child, grace_s=0.1) is False
    assert child.describe_end() == "killed by SIGKILL"


async def test_a_child_dies_with_us(tmp_path: Path) -> None:
    script = f"""
import asyncio, os
from katapod.host.process import spawn
async def main():
    child = await spawn(["sh", "-c", "echo $$ > '{tmp_path}/pid'; exec sleep 1000"], output=-3)
    while not os.path.exists("{tmp_path}/pid") or not open("{tmp_path}/pid").read():
        await asyncio.sleep(0.01)
    os.kill(os.getpid(), {int(signal.SIGKILL)})
asyncio.run(main())
"""
    ended = await run([sys.executable, "-c", script], check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    await gone(int((tmp_path / "pid").read_text()))


async def gone(pid: int) -> None:
    """Wait until a process has ended; a zombie has."""

    def has_ended() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    await until(has_ended)


async def content_of(path: Path) -> str:
    """What another process writes into a file, once it has: one line."""
    await until(lambda: path.exists() and path.read_text().endswith("\n"))
    return path.read_text()


def watch_after(monkeypatch: pytest.MonkeyPatch, wait: Callable[[], object]) -> None:
    """asyncio's watcher of a process is a thread in Python 3.11, which comes late on a busy machine."""
    watch = ThreadedChildWatcher._do_waitpid  # type: ignore[attr-defined]

    def late(*args: object) -> None:
        wait()
        watch(*args)

    monkeypatch.setattr(ThreadedChildWatcher, "_do_waitpid", late)


async def test_a_child_that_ends_as_it_is_killed_is_still_seen_by_its_watcher(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Popen.kill() looks first whether the child has ended, and may take its status away from asyncio's watcher."""
    killed = threading.Event()
    watch_after(monkeypatch, killed.wait)
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "out").open("wb") as out:
        # From Python 3.12 on the loop is the watcher, and runs until the child has been started: it must outlive that.
        child = await spawn(["sh", "-c", f"read word < '{tmp_path}/fifo'"], output=out)
    (tmp_path / "fifo").write_text("end\n")
    while "State:\tZ" not in Path(f"/proc/{child.pid}/status").read_text():
        time.sleep(0.001)  # noqa: ASYNC251 - the loop must not come first
    asyncio.get_running_loop().call_soon(killed.set)  # once stop_child has to wait
    await stop_child(child, soft=False)
    assert child.process.returncode == 0
    assert caplog.records == []
