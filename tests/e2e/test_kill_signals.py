"""SIGINT and SIGTERM at any moment of `run`, and guests and programs that hang."""

import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults import (
    SHARED,
    Finished,
    Started,
    container_state,
    delete,
    fresh_name,
    kata,
    leftovers,
    processes_of,
    record_of,
    start,
    start_exec,
    virtiofsd_of,
    vmm_of,
    wait_until,
    write_config,
)

from kit.templates import templates_are_on

START_S = 2.0 if templates_are_on() else 5.0  # about; later moments hit the running container
SEED = 20260101
BLOCKED = "trap true TERM INT; touch /v/up; while true; do sleep 1; done"


@pytest.fixture
def name() -> Iterator[str]:
    chosen = fresh_name("sig")
    yield chosen
    assert leftovers(chosen) == []


def ended_by(done: Finished, number: int) -> bool:
    """By the signal, in our words (128 + number) or, before our program was loaded, in the kernel's (-number)."""
    return done.code in (128 + number, -number)


def moments(count: int, seed: int) -> list[float]:
    """Moments spread over a start, a random one in each of `count` equal parts."""
    chosen = random.Random(seed)
    return [(part + chosen.random()) * START_S / count for part in range(count)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signal_at_any_moment_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    def one(moment: float) -> None:
        name = fresh_name("sig")
        ready = tmp_path / name / "ready"
        ready.parent.mkdir()
        script = "trap 'exit 77' INT TERM; touch /v/ready; sleep 1000 & wait"
        with start("--rm", "-v", f"{ready.parent}:/v", "busybox", "sh", "-c", script, name=name) as running:
            time.sleep(moment)
            codes = {77}
            early = not ready.exists()
            running.signal(number)
            if early:
                # If its PID 1 ran and had not set its trap, the kernel drops what such a process does not handle.
                # Whoever pressed Ctrl-C presses it again, which kills if the first one has arrived.
                wait_until("its end or its trap", lambda: running.process.poll() is not None or ready.exists())
                if running.process.poll() is None:
                    running.signal(number)
                    codes = {77, 137}
            done = running.end()
            shown = f"{number.name} after {moment:.2f} s: {done}"
            print(shown)
            unborn = number == signal.SIGINT and done.code == 1 and "init_import_site" in done.err
            assert ended_by(done, number) or done.code in codes or unborn, shown
            # before our program is loaded, the interpreter may say so in its own way
            assert "Traceback" not in done.err or "/katapod/" not in done.err, shown
            assert "internal error" not in done.err, shown
            assert leftovers(name) == [], shown

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, moments(10, SEED + number)))


@pytest.mark.parametrize("mark", ["claimed", "virtiofsd", "vmm", "running"])
def test_signals_in_quick_succession_do_not_break_off_the_clean_up(name: str, mark: str) -> None:
    seen = {
        "claimed": lambda: record_of(name),
        "virtiofsd": lambda: processes_of(name, "virtiofsd"),
        "vmm": lambda: vmm_of(name),
        "running": lambda: record_of(name).get("state") == "running",
    }
    with start("--rm", *SHARED, "busybox", "sleep", "1000", name=name) as running:
        wait_until(mark, seen[mark], period_s=0.001)
        for pause in (0.0, 0.01, 0.05, 0.1, 0.1):
            time.sleep(pause)
            if running.process.poll() is None:
                running.signal(signal.SIGTERM)
        done = running.end()
        # a container that had just started dies of the second signal
        assert ended_by(done, signal.SIGTERM) or done.code == 137, done
        assert "Traceback" not in done.err
        assert leftovers(name) == []


def test_signal_before_the_container_listens(name: str) -> None:
    """PID 1 of a container that has no handler does not see SIGINT: as with any runtime; the second request kills."""
    with start("--rm", "busybox", "sleep", "1000", name=name) as running:
        wait_until("running", lambda: container_state(name) == "running")
        running.signal(signal.SIGINT)
        running.signal_is_taken(signal.SIGINT)
        time.sleep(0.5)
        assert container_state(name) == "running"
        running.signal(signal.SIGINT)
        assert running.end().code == 137
    assert leftovers(name) == []


@pytest.mark.parametrize("mark", ["claimed", "virtiofsd", "vmm"])
def test_signal_to_a_detached_start_ends_the_background_too(name: str, mark: str) -> None:
    seen = {"claimed": record_of, "virtiofsd": virtiofsd_of, "vmm": vmm_of}[mark]
    with start("-d", *SHARED, "busybox", "sleep", "1000", name=name) as running:
        wait_until(mark, lambda: seen(name), period_s=0.001)
        running.signal(signal.SIGTERM)
        done = running.end()
        assert ended_by(done, signal.SIGTERM), done
        assert "Traceback" not in done.err
        assert leftovers(name) == []


@pytest.mark.core
def test_signals_are_forwarded_and_a_deaf_container_dies_of_the_second(name: str, tmp_path: Path) -> None:
    with start("--rm", "-v", f"{tmp_path}:/v", "busybox", "sh", "-c", BLOCKED, name=name) as running:
        wait_until("the container is up", lambda: (tmp_path / "up").exists())
        running.signal(signal.SIGTERM)
        running.signal_is_taken(signal.SIGTERM)
        time.sleep(1)
        assert running.process.poll() is None
        running.signal(signal.SIGTERM)
        assert running.end().code == 137
    assert leftovers(name) == []


def test_signal_during_an_import_leaves_nothing(name: str) -> None:
    """A slow import: the registry takes the connection, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as registry:
        registry.settimeout(180)
        port = registry.getsockname()[1]
        with start("--rm", f"docker://127.0.0.1:{port}/slow:1", "true", name=name) as running:
            connection, _ = registry.accept()
            with connection:
                assert record_of(name)
                running.signal(signal.SIGINT)
                done = running.end()
        assert ended_by(done, signal.SIGINT), done
        assert "Traceback" not in done.err
        assert leftovers(name) == []


def hang(running: Started) -> int:
    pid = vmm_of(running.name)
    assert pid, "its VMM runs"  # 0 would be all of us
    os.kill(pid, signal.SIGSTOP)
    return pid


def test_hanging_vm_is_named_and_can_be_removed(name: str) -> None:
    """VMM stopped by SIGSTOP: exec and kill end in a bounded time, the health check names it, delete --force works."""
    other = fresh_name("sig")
    with (
        start("--rm", "busybox", "sleep", "1000", name=name) as running,
        start("--rm", "busybox", "sleep", "1000", name=other) as second,
    ):
        for each in (running, second):
            wait_until("running", lambda each=each: container_state(each.name) == "running")  # type: ignore[misc]
            hang(each)
        began = time.monotonic()
        removed = delete(other)
        assert (removed.code, removed.err) == (0, "")
        assert time.monotonic() - began < 180
        assert leftovers(other) == []
        second.end()
        with start_exec(name, "true") as blocked:
            killed = kata("kill", name, limit_s=180)
            done = blocked.end()
        print(f"exec: {done}\nkill: {killed}")
        done.assert_clean_error()
        killed.assert_clean_error(1)
        assert "hangs" in done.err
        ended = running.end()
        print(f"run: {ended}, after {time.monotonic() - began:.1f} s")
        ended.assert_clean_error()
        assert "hangs: its agent did not answer" in ended.err
        assert time.monotonic() - began < 180
    assert leftovers(name) == []


@pytest.mark.qemu("a kernel that is told not to get up")
def test_vm_that_hangs_in_its_start_ends_after_dial_timeout(name: str, tmp_path: Path) -> None:
    never_up = {"kernel_params": "rdinit=/none panic=0"}
    config = write_config(tmp_path, qemu=never_up, agent={"dial_timeout": 10}, factory={"enable_template": False})
    with start("--rm", "busybox", "true", name=name, config=config) as running:
        wait_until("the guest boots", lambda: record_of(name).get("vmm_pid"))
        hang(running)
        done = running.end().assert_clean_error()
        assert "did not answer within" in done.err
        assert leftovers(name) == []
