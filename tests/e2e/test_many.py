"""Many sandboxes at the same time, and several commands at the same sandbox."""

import contextlib
import json
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from faults import (
    KATA,
    SHARED,
    Finished,
    Started,
    container_state,
    delete,
    die_hard,
    fresh_name,
    kata,
    leftovers,
    record_of,
    start,
    start_exec,
    virtiofsd_of,
    vmm_of,
    wait_until,
    write_config,
)

SEED = 4242


@pytest.fixture
def name() -> Iterator[str]:
    chosen = fresh_name("many")
    yield chosen
    assert leftovers(chosen) == []


@contextlib.contextmanager
def several(count: int, *command: str, flags: tuple[str, ...] = SHARED) -> Iterator[list[Started]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(start("--rm", "-m", "64m", *flags, "busybox", *command, name=fresh_name("many")))
            for _ in range(count)
        ]


@pytest.mark.alone
def test_eight_sandboxes_at_the_same_time(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        all_of_them = []
        for number in range(8):
            script = (
                f"touch /v/up-{number}; until test -e /v/go; do sleep 0.2; done; echo marker-{number}; exit {number}"
            )
            args = ("--rm", "-m", "64m", "-v", f"{tmp_path}:/v", "busybox", "sh", "-c", script)
            all_of_them.append(stack.enter_context(start(*args, name=fresh_name("many"))))
        # all run at once: none ends before all are up
        wait_until("eight are up", lambda: len(list(tmp_path.glob("up-*"))) == 8)
        rows = {row["name"]: row for row in json.loads(kata("list", "--json").out)}
        assert all(rows[each.name]["state"] == "running" for each in all_of_them)
        (tmp_path / "go").touch()
        for number, each in enumerate(all_of_them):
            done = each.end()
            assert (done.code, done.out, done.err) == (number, f"marker-{number}\n", "")
        for each in all_of_them:
            assert leftovers(each.name) == []


def victims(running: Started, what: str) -> list[int]:
    if what == "virtiofsd":
        return virtiofsd_of(running.name)
    return [running.pid if what == "supervisor" else vmm_of(running.name)]


@pytest.mark.alone
def test_a_killed_one_does_not_disturb_the_others(tmp_path: Path) -> None:
    chosen = random.Random(SEED)
    for turn in range(3):
        over = tmp_path / f"over-{turn}"
        script = f"until test -e /v/{over.name}; do sleep 0.2; done; echo done"
        with several(4, "sh", "-c", script, flags=("-v", f"{tmp_path}:/v")) as group:
            victim = group[chosen.randrange(4)]
            what = ["supervisor", "vmm", "virtiofsd"][turn]
            wait_until("its VM", partial(vmm_of, victim.name))
            time.sleep(chosen.random() * 4)
            targets = victims(victim, what)
            assert targets
            assert 0 not in targets, "ended before the kill"
            die_hard(targets[0])
            over.touch()
            for each in group:
                done = each.end()
                if each is victim:
                    assert done.code in (125, -9), (what, done)
                    if what == "supervisor":
                        delete(each.name)
                else:
                    # the others may say that they cleaned up behind it, but nothing else
                    assert (done.code, done.out) == (0, "done\n"), done
                assert leftovers(each.name) == []


@pytest.mark.alone
def test_random_kills_during_the_start_leave_nothing() -> None:
    """The gaps between the phases: a fixed seed, three at a time, of which one or two wait for their moment."""
    chosen = random.Random(SEED)
    plans = [(chosen.uniform(0.05, 4.0), chosen.choice(["supervisor", "vmm", "virtiofsd"])) for _ in range(12)]

    def one(moment: float, what: str) -> None:
        name = fresh_name("many")
        with start("--rm", *SHARED, "busybox", "sleep", "1000", name=name) as running:
            time.sleep(moment)
            targets = victims(running, what)
            if not targets or targets == [0]:
                targets, what = [running.pid], "supervisor"  # it has none yet
            die_hard(targets[-1])
            done = running.end()
            shown = f"{what} after {moment:.2f} s: {done}"
            if what == "supervisor":
                wait_until("its VM is gone", lambda: not vmm_of(name) and not virtiofsd_of(name))
                removed = delete(name)
                assert (removed.code, removed.err) == (0, ""), shown
            else:
                done.assert_clean_error()
                assert "killed by SIGKILL" in done.err or "virtiofsd ended" in done.err, shown
                assert done.took_s < 180, shown
            assert leftovers(name) == [], shown

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda plan: one(*plan), plans))


def test_two_starts_with_one_name(name: str, tmp_path: Path) -> None:
    run = ("--rm", "-v", f"{tmp_path}:/v", "busybox", "sh", "-c", "until test -e /v/end; do sleep 0.1; done; echo won")
    with start(*run, name=name) as first:
        with start(*run, name=name) as second:
            wait_until("one has lost", lambda: any(each.process.poll() is not None for each in (first, second)))
            (tmp_path / "end").touch()
            ends = sorted([first.end(), second.end()], key=lambda done: done.code)
        assert (ends[0].code, ends[0].out) == (0, "won\n")
        ends[1].assert_clean_error()
        assert f"cannot create {name}: the name is taken" in ends[1].err


def test_name_is_taken_while_it_runs_and_after(name: str) -> None:
    assert kata("run", "-d", "--name", name, "busybox", "sleep", "1000").code == 0
    for _ in range(2):
        taken = kata("run", "--name", name, "busybox", "true").assert_clean_error()
        assert f"the name is taken\n  hint: choose another, or remove it: kata-runtime delete {name}" in taken.err
        assert record_of(name)
        kata("kill", name)
        wait_until("stopped", lambda: record_of(name).get("state") == "stopped")
    assert delete(name).code == 0


@pytest.mark.qemu("a guest that takes seconds to boot, without a template")
def test_delete_during_the_start(name: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, factory={"enable_template": False})
    with start("--rm", "busybox", "sleep", "1000", name=name, config=config) as running:
        wait_until("claimed", lambda: record_of(name))
        refused = kata("delete", name).assert_clean_error(1)
        assert "delete --force" in refused.err
        removed = delete(name)
        assert (removed.code, removed.err) == (0, "")
        assert running.end().code == 143
        assert leftovers(name) == []


@pytest.mark.parametrize("mark", ["starting", "running"])
def test_delete_twice_at_once(name: str, mark: str) -> None:
    with start("busybox", "sleep", "1000", name=name) as running:
        wait_until("claimed", lambda: record_of(name))
        if mark == "running":
            wait_until("running", lambda: container_state(name) == "running")
        with ThreadPoolExecutor(3) as pool:
            for removed in pool.map(lambda _: delete(name), range(3)):
                assert (removed.code, removed.err) == (0, ""), removed
        running.end()
        assert leftovers(name) == []


def test_list_never_fails_while_sandboxes_come_and_go() -> None:
    over = threading.Event()
    results: list[Finished] = []

    def watch() -> None:
        while not over.is_set():
            results.append(kata("list"))
            results.append(kata("list", "--json"))

    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(watch)
        try:
            with several(2, "true") as group:
                for each in group:
                    assert each.end().code == 0
            # the record's whole life without a VM is short: many of these
            turn = 0
            while turn < 8 or len(results) <= 10:
                kata("run", "--rm", "--name", fresh_name("many"), "no-such-image")
                assert not seen.done(), seen.result()
                turn += 1
        finally:
            over.set()
        seen.result()
    for done in results:
        assert (done.code, done.err) == (0, ""), done


def test_exec_racing_with_the_end(name: str, tmp_path: Path) -> None:
    """Execs started all along the end of a container: each works, or says that the container has ended."""
    script = "until test -e /v/end; do sleep 0.05; done"
    with start("--rm", "-v", f"{tmp_path}:/v", "busybox", "sh", "-c", script, name=name) as running:
        wait_until("running", lambda: container_state(name) == "running")
        with contextlib.ExitStack() as stack:
            beside = [stack.enter_context(start_exec(name, "echo", "here"))]
            execs = [beside.pop().end()]
            while running.process.poll() is None and len(beside) < 20:
                beside.append(stack.enter_context(start_exec(name, "echo", "here")))
                if len(beside) == 5:
                    (tmp_path / "end").touch()
                time.sleep(0.15)
            execs += [each.end() for each in beside]
        assert running.end().code == 0
    assert execs[0].code == 0
    for done in execs:
        if done.code == 0:
            assert done.out == "here\n"
        elif done.code == 137:
            assert "Traceback" not in done.err  # it was among the processes that ended with the container
        else:
            done.assert_clean_error()
            assert any(word in done.err for word in ("ended", "no such container", "stopped")), done


def test_parallel_first_use_of_an_image(tmp_path: Path) -> None:
    """Imports of the same image by several at once do not disturb each other."""
    layout = tmp_path / "layout"
    for words in (["init", "--layout", str(layout)], ["new", "--image", f"{layout}:x"]):
        subprocess.run(["umoci", *words], check=True, capture_output=True)
    with ThreadPoolExecutor(4) as pool:
        imports = list(pool.map(lambda _: kata("image", "import", f"oci:{layout}:x", "many-test:x"), range(4)))
    try:
        assert [done.code for done in imports] == [0, 0, 0, 0], imports
    finally:
        subprocess.run([KATA, "image", "rm", "many-test:x"], check=False, capture_output=True)
