"""Recovery from disk: idempotent, never at a living supervisor's or a stranger's expense."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from katapod.host.locks import lock_holder
from katapod.host.state import StateStore, supervisor_alive
from katapod.model.errors import InvalidState
from katapod.model.record import ContainerRecord, SandboxRecord, State
from katapod.sandbox import recovery
from katapod.sandbox.recovery import _processes_of, adopt_kept, find_leftovers, reap_dead, remove_sandbox
from kit.library import layout_below

OWNER = """
import sys, time
from pathlib import Path
from katapod.host.state import StateStore
from katapod.model.layout import Layout
from katapod.model.record import SandboxRecord
lock = StateStore(Layout(state_root=Path(sys.argv[1]))).create(SandboxRecord("s1", 1.0, 1, "b"))
print("owned", flush=True)
time.sleep(60)
"""


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    return StateStore(layout_below(tmp_path))


@pytest.fixture
def supervisor(store: StateStore) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-c", OWNER, str(store.layout.state_root)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"owned\n"
        yield child
        child.kill()


def record(sandbox_id: str, **changes: object) -> SandboxRecord:
    return msgspec.structs.replace(SandboxRecord(sandbox_id, created_at=1.0, supervisor_pid=1, boot_id="b"), **changes)


def leave(store: StateStore, sandbox_id: str, **changes: object) -> None:
    """What a killed supervisor leaves."""
    os.close(store.create(record(sandbox_id, **changes)))
    paths = store.layout.sandbox(sandbox_id)
    for directory in (paths.mounts, paths.vm, paths.layers / "c"):
        directory.mkdir(parents=True)
        (directory / "file").touch()
    paths.container_log.touch()


async def test_remove_and_remove_again(store: StateStore) -> None:
    leave(store, "s1")
    assert len(find_leftovers(store.layout, "s1")) == 4
    for _ in range(2):
        await remove_sandbox(store, "s1")
        assert find_leftovers(store.layout, "s1") == []
    await remove_sandbox(store, "never-there", force=True)


async def test_half_a_sandbox(store: StateStore) -> None:
    leave(store, "s1")
    store.layout.sandbox("s1").persist.unlink()
    store.layout.sandbox("s1").lock.unlink()
    await remove_sandbox(store, "s1")
    assert find_leftovers(store.layout, "s1") == []


async def test_reaping(store: StateStore) -> None:
    ran = ContainerRecord("c", "image", ("sh",), state=State.RUNNING, started_at=5.0)
    leave(store, "never-ran")
    leave(store, "throw-away", auto_remove=True, containers=(ran,))
    leave(store, "kept", state=State.RUNNING, containers=(ran,), vmm_pid=1)
    leave(store, "stopped", state=State.STOPPED)
    lock = store.create(record("alive"))
    assert await reap_dead(store) == ["kept", "never-ran", "throw-away"]
    assert store.ids() == ["alive", "kept", "stopped"]
    kept = store.read("kept")
    assert (kept.state, kept.vmm_pid, kept.error) == (State.STOPPED, 0, "the process that ran it was killed")
    assert [(item.state, item.exit_code) for item in kept.containers] == [(State.STOPPED, 137)]
    paths = store.layout.sandbox("kept")
    assert paths.container_log.exists()
    assert not any(directory.exists() for directory in (paths.share, paths.vm, paths.layers))
    assert await reap_dead(store) == []
    os.close(lock)


async def test_what_was_created_stays(store: StateStore) -> None:
    made = ContainerRecord("c", "image", ("sh",), state=State.CREATED)
    leave(store, "made", state=State.CREATED, lasting=True, auto_remove=True, containers=(made,))
    assert await reap_dead(store) == []
    assert store.read("made").state is State.CREATED


@pytest.mark.parametrize("before", [State.CREATED, State.RUNNING, State.STOPPED])
async def test_a_start_again_that_is_killed_leaves_what_was_there(store: StateStore, before: State) -> None:
    """Before it had the container again: its record says less than the one that was kept."""
    leave(store, "s1", lasting=True, vmm_pid=1)
    paths = store.layout.sandbox("s1")
    paths.files.mkdir(parents=True)
    container = ContainerRecord("s1", "image", ("sh",), state=before, exit_code=5 if before is State.STOPPED else None)
    store.keep(record("s1", state=before, lasting=True, containers=(container,)))
    assert await reap_dead(store) == ["s1"]
    found = store.read("s1")
    created = before is State.CREATED
    assert found.state is (State.CREATED if created else State.STOPPED)
    assert (found.vmm_pid, found.error) == (0, "the process that ran it was killed")
    assert [(item.state, item.exit_code) for item in found.containers] == [
        (State.CREATED, None) if created else (State.STOPPED, 5 if before is State.STOPPED else 137)
    ]
    assert paths.files.exists()
    assert not any(directory.exists() for directory in (paths.share, paths.vm, paths.layers))
    assert store.kept("s1") == found


async def test_a_supervisor_killed_as_it_waits_to_start_again(store: StateStore) -> None:
    ended = ContainerRecord("s1", "image", ("sh",), state=State.STOPPED, started_at=1.0, exit_code=4)
    leave(store, "s1", state=State.STOPPED, restart="always", restart_at=9.0, containers=(ended,))
    assert await reap_dead(store) == ["s1"]
    found = store.read("s1")
    assert (found.restart_at, found.state, found.containers[0].exit_code) == (0, State.STOPPED, 4)


async def test_a_start_of_the_host_leaves_what_can_be_started_again(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "boot_time", lambda: time.time() + 60)
    ran = ContainerRecord("c", "image", ("sh",), state=State.RUNNING, started_at=5.0)
    made = ContainerRecord("c", "image", ("sh",), state=State.CREATED)
    for sandbox_id, changes in {
        "ran": {"state": State.RUNNING, "containers": (ran,), "vmm_pid": 7, "restart": "always"},
        "made": {"state": State.CREATED, "containers": (made,), "auto_remove": True},
        "rm": {"state": State.RUNNING, "containers": (ran,), "auto_remove": True},
    }.items():
        store.layout.sandbox(sandbox_id).files.mkdir(parents=True)
        store.keep(record(sandbox_id, **changes))
    store.layout.sandbox("broken").files.mkdir(parents=True)
    store.layout.sandbox("broken").kept_record.write_text("{")
    store.layout.sandbox("forged").files.mkdir(parents=True)
    store.layout.sandbox("forged").kept_record.write_bytes(store.layout.sandbox("ran").kept_record.read_bytes())
    await adopt_kept(store)
    assert store.ids() == ["made", "ran"]
    assert sorted(await reap_dead(store)) == ["broken", "forged", "rm"]
    found = store.read("ran")
    assert (found.state, found.vmm_pid, found.restart) == (State.STOPPED, 0, "always")
    assert [(item.exit_code, item.error) for item in found.containers] == [(137, "this host was started anew")]
    assert store.read("made").state is State.CREATED
    assert store.layout.sandbox("ran").files.exists()
    assert not supervisor_alive(store.layout.sandbox("ran"))


async def test_a_hostile_tree_stops_nothing(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """More directories in each other than Python can recurse, and than a path has room for."""
    monkeypatch.setattr(recovery, "REAP_LIMIT_S", 60.0)  # disks may be slow
    leave(store, "s1", auto_remove=True)
    here = os.open(store.layout.sandbox("s1").layers / "c", os.O_RDONLY)
    for _ in range(1101):
        os.mkdir("deep", dir_fd=here)
        below = os.open("deep", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    assert await reap_dead(store) == ["s1"]
    assert find_leftovers(store.layout, "s1") == []
    assert os.listdir(store.layout.data_root) == []


async def test_what_cannot_be_removed_is_set_aside_told_of_and_tried_again(
    store: StateStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    leave(store, "s1", auto_remove=True)
    leave(store, "s2", auto_remove=True)
    original = os.unlink

    def refuses(path: str, *, dir_fd: int | None = None) -> None:
        place = f"{os.readlink(f'/proc/self/fd/{dir_fd}')}/{path}" if dir_fd is not None else str(path)
        if "data/" in place and "s1" in place and place.endswith("file"):
            raise OSError(5, "Input/output error")
        original(path, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuses)
        assert await reap_dead(store) == ["s1", "s2"]  # the names are free
        assert find_leftovers(store.layout, "s1") == find_leftovers(store.layout, "s2") == []
        (aside,) = store.layout.data_root.iterdir()
        assert aside.name.startswith(".s1.")
        assert f"set aside as {aside}" in caplog.text
        caplog.clear()
        assert await reap_dead(store) == []
        assert f"cannot remove {aside}, 'file' in it: Input/output error" in caplog.text
    assert await reap_dead(store) == []
    assert not aside.exists()


async def test_what_takes_too_long_is_set_aside_and_waited_for_by_nobody(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(store, "s1", auto_remove=True)
    leave(store, "s2")
    store.write(record("s2", containers=(ContainerRecord("s2", image="i", command=("c",), started_at=1.0),)))
    monkeypatch.setattr(recovery, "REAP_LIMIT_S", -1.0)
    assert await reap_dead(store) == ["s1", "s2"]
    assert store.ids() == ["s2"]
    assert len([path for path in store.layout.data_root.iterdir() if path.name.startswith(".s1.")]) == 1
    monkeypatch.undo()
    await reap_dead(store)
    assert os.listdir(store.layout.data_root) == ["s2"]
    assert os.listdir(store.layout.sandbox("s2").data) == ["container.log"]


async def test_an_error_of_any_kind_stops_no_start(
    store: StateStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    leave(store, "s1", auto_remove=True)
    leave(store, "s2", auto_remove=True)
    remove = recovery.remove_sandbox

    async def fails(store: StateStore, sandbox_id: str, *, deadline: float | None = None) -> None:
        if sandbox_id == "s1":
            raise RecursionError("maximum recursion depth exceeded")
        await remove(store, sandbox_id, deadline=deadline)

    monkeypatch.setattr(recovery, "remove_sandbox", fails)
    assert await reap_dead(store) == ["s2"]
    assert "cannot clean up after s1: maximum recursion depth exceeded" in caplog.text


async def test_what_another_runtime_keeps_beside_us_is_left_alone(store: StateStore) -> None:
    """Kata's own runtime uses the same root, with a persist.json of another form."""
    foreign = store.layout.sandbox("f00")
    foreign.state.mkdir(parents=True)
    foreign.persist.write_text('{"State": "running", "SandboxContainer": "f00"}')
    foreign.vm.mkdir(parents=True)
    os.utime(foreign.state, (1, 1))
    assert await reap_dead(store) == []
    assert foreign.persist.exists()
    assert foreign.vm.exists()


async def test_a_living_supervisor(store: StateStore, supervisor: subprocess.Popen[bytes]) -> None:
    paths = store.layout.sandbox("s1")
    assert lock_holder(paths.lock) == supervisor.pid
    with pytest.raises(InvalidState, match="cannot remove s1: it is in use"):
        await remove_sandbox(store, "s1")
    assert paths.persist.exists()
    await remove_sandbox(store, "s1", force=True, grace_s=60.0)
    assert supervisor.wait() == -signal.SIGTERM
    assert not paths.state.exists()


async def test_no_lock_no_holder(store: StateStore) -> None:
    leave(store, "s1")
    paths = store.layout.sandbox("s1")
    assert lock_holder(paths.lock) is None
    assert not supervisor_alive(paths)
    assert lock_holder(store.layout.sandbox("none").lock) is None


@pytest.mark.parametrize(
    ("name", "argument", "found"),
    [
        ("qemu-system-x86_64", "{vm}/{id}/pid", True),
        ("qemu-system-x86_64", "/elsewhere/{id}/pid", False),  # of other roots, by the same name
        ("qemu-system-x86_64", "{vm}/my-{id}/pid", False),
        ("qemu-system-x86_64", "{vm}/{id}x/pid", False),
        ("virtiofsd", "source={share}/{id}/shared,cache=auto", True),
        ("virtiofsd", "--shared-dir={share}/{id}/shared", True),
        ("virtiofsd", "--shared-dir={share}/{id}x/shared", False),
        ("editor", "{vm}/{id}/pid", False),
    ],
)
def test_which_processes_are_a_sandbox_s_own(
    store: StateStore, tmp_path: Path, name: str, argument: str, found: bool
) -> None:
    sandbox_id = f"t{os.getpid()}"
    program = tmp_path / name
    program.symlink_to(sys.executable)
    text = argument.format(id=sandbox_id, share=store.layout.share_root, vm=store.layout.vm_root)
    with subprocess.Popen([str(program), "-c", "import time; time.sleep(60)", "-name", text]) as child:
        try:
            while b"\0-name" not in Path(f"/proc/{child.pid}/cmdline").read_bytes():
                time.sleep(0.005)
            assert (child.pid in list(_processes_of(store.layout, sandbox_id))) is found
        finally:
            child.kill()


def leave_pooled(store: StateStore, sandbox_id: str, machine_id: str, **changes: object) -> None:
    """What the supervisor of a sandbox leaves whose machine came from the pool, killed as it took it."""
    os.close(store.create(record(machine_id, pooled=True, auto_remove=True)))
    os.close(store.create(record(sandbox_id, machine_id=machine_id, **changes)))
    paths = store.layout.sandbox(sandbox_id, machine_id)
    for directory in (paths.mounts, paths.vm, paths.layers / "c"):
        directory.mkdir(parents=True)
    paths.container_log.touch()


async def test_a_machine_of_the_pool_goes_with_its_sandbox(store: StateStore) -> None:
    leave_pooled(store, "s1", "pool-1")
    await remove_sandbox(store, "s1")
    assert find_leftovers(store.layout, "s1") + find_leftovers(store.layout, "pool-1") == []


async def test_a_settled_sandbox_keeps_nothing_of_its_machine(store: StateStore) -> None:
    ran = ContainerRecord("s1", image="i", command=("c",), state=State.RUNNING, started_at=1.0)
    leave_pooled(store, "s1", "pool-1", containers=(ran,))
    assert await reap_dead(store) != []
    assert find_leftovers(store.layout, "pool-1") == []
    assert store.read("s1").state is State.STOPPED
    assert store.layout.sandbox("s1").container_log.exists()


async def test_a_machine_that_nobody_took_is_reaped(store: StateStore) -> None:
    leave(store, "pool-1", pooled=True, auto_remove=True)
    assert await reap_dead(store) == ["pool-1"]
    assert find_leftovers(store.layout, "pool-1") == []
