"""What a container can be started again by, and when its policy does it."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katapod.host.state import StateStore, supervisor_alive
from katapod.model.errors import InvalidState, KatapodError
from katapod.model.flags import UserName
from katapod.model.json_text import decode_json, encode_json
from katapod.model.mount_flags import NamedVolume, TmpfsMount, Volume
from katapod.model.net_flags import NetworkRequest, PortRequest
from katapod.model.record import ContainerRecord, SandboxRecord, State
from katapod.model.run_flags import RestartPolicy
from katapod.model.seccomp_profile import parse_seccomp_profile
from katapod.plan.container_spec import ContainerOptions
from katapod.sandbox.endings import end_policy, note_stop
from katapod.supervisor.kept import DiskMark, KeptRequest, keep_request, kept_disk, mark_of, read_kept
from katapod.supervisor.restarting import Backoff, next_run
from katapod.supervisor.run_request import RunRequest
from kit.library import layout_below

PROFILE = b"""{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO",
"args": [{"index": 0, "value": 18446744073709551615, "op": "SCMP_CMP_EQ"}], "includes": {"minKernel": "4.8"}}]}"""


def asked(**changes: Any) -> RunRequest:
    plain = RunRequest("c1", "busybox", None, None, ContainerOptions(), False, False, "", {}, None)  # type: ignore[arg-type]
    return replace(plain, **changes)


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    return StateStore(layout_below(tmp_path))


def at_rest(store: StateStore, **changes: Any) -> SandboxRecord:
    """On record, as a container that has ended with status 3."""
    container = ContainerRecord("c1", "busybox", ("sh",), State.STOPPED, exit_code=3, image_digest="sha256:1")
    record = SandboxRecord("c1", 1.0, 1, "b", state=State.STOPPED, containers=(container,))
    record = replace(record, **changes)
    os.close(store.create(record))
    store.layout.sandbox("c1").data.mkdir(parents=True, exist_ok=True)
    return record


def test_a_request_comes_back_as_it_was() -> None:
    options = ContainerOptions(
        user=UserName(user="a"),
        env=("A=\udcff",),  # a byte that is no UTF-8
        volumes=(Volume(source="/s", destination="/d"),),
        named_volumes=(NamedVolume(name="db", destination="/db"),),
        tmpfs=(TmpfsMount(destination="/t", options=("size=1m",)),),
        seccomp=parse_seccomp_profile(PROFILE, "profile"),
    )
    network = NetworkRequest(ports=(PortRequest(container_port=80),), hosts=(("a", "1.2.3.4"),))
    request = asked(
        options=options,
        network=network,
        rootfs=Path("/srv/\udcff"),
        cpus_allowed=frozenset({0, 2}),
        restart=RestartPolicy("on-failure", 3),
    )
    for kept in (KeptRequest(request, "sha256:1", DiskMark("/d", 1, 2)), KeptRequest(asked())):
        assert decode_json(encode_json(kept), KeptRequest) == kept


def test_what_was_asked_once_is_not_asked_again(store: StateStore) -> None:
    keep_request(store.layout, KeptRequest(asked(replace=True, cid_file=Path("/cid")), "sha256:1"))
    path = store.layout.sandbox("c1").kept_request
    assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0
    again = read_kept(store.layout, "c1").again
    assert (again.replace, again.cid_file, again.again, again.image_digest) == (False, None, True, "sha256:1")


def test_nothing_is_kept_of_a_container_of_an_earlier_version(store: StateStore) -> None:
    with pytest.raises(InvalidState, match="nothing was kept to start it again by"):
        read_kept(store.layout, "c1")
    path = store.layout.sandbox("c1").kept_request
    path.parent.mkdir(parents=True)
    for text in ("{", "[]", "{}", '{"request": 1}'):
        path.write_text(text)
        with pytest.raises(KatapodError, match="cannot read"):
            read_kept(store.layout, "c1")


def test_files_lie_over_the_disk_that_they_were_made_for(store: StateStore, tmp_path: Path) -> None:
    paths, base = store.layout.sandbox("c1"), tmp_path / "base"
    base.write_bytes(b"disk")
    assert kept_disk(store.layout, "c1") == (False, None)
    paths.files.mkdir(parents=True)
    (paths.files / "root.qcow2").touch()
    keep_request(store.layout, KeptRequest(asked(), "sha256:1", mark_of(base)))
    assert kept_disk(store.layout, "c1") == (True, base)
    base.write_bytes(b"made anew")
    with pytest.raises(KatapodError, match="a disk of its image that was made anew since"):
        kept_disk(store.layout, "c1")
    base.unlink()
    with pytest.raises(KatapodError, match="cannot use the disk"):
        kept_disk(store.layout, "c1")
    (paths.files / "upper").mkdir()  # by virtio-fs: no disk is needed
    assert kept_disk(store.layout, "c1") == (True, None)


def test_waits_grow_until_a_run_was_long() -> None:
    backoff = Backoff()
    waits = [backoff.after(0.0) for _ in range(12)]
    assert waits[:4] == [0.1, 0.2, 0.4, 0.8]
    assert waits[-1] == 60.0
    assert backoff.after(10.0) == 0.1


async def test_a_policy_starts_it_again(store: StateStore) -> None:
    at_rest(store, restarts=1)
    request = asked(restart=RestartPolicy("on-failure", 2), replace=True)
    again = await next_run(store, request, 3, 0.0)
    assert again is not None
    assert (again.again, again.restarts, again.image_digest, again.replace) == (True, 2, "sha256:1", False)
    assert store.read("c1").restart_at == 0
    assert await next_run(store, request, 0, 0.0) is None  # it has not failed
    at = store.read("c1")
    store.write(replace(at, restarts=2))
    assert await next_run(store, request, 3, 0.0) is None  # often enough
    store.write(replace(at, stop_asked=True))
    assert await next_run(store, replace(request, restart=RestartPolicy("always")), 3, 0.0) is None
    store.discard("c1")
    assert await next_run(store, request, 3, 0.0) is None


async def test_who_waits_has_the_name_and_ends_when_it_is_stopped(store: StateStore) -> None:
    at_rest(store)
    paths = store.layout.sandbox("c1")
    waiting = asyncio.create_task(next_run(store, asked(restart=RestartPolicy("always")), 0, 3600.0))
    while not supervisor_alive(paths):  # noqa: ASYNC110 - nobody tells of it
        await asyncio.sleep(0.01)
    assert store.read("c1").restart_at > 0
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    record = store.read("c1")
    assert (record.restart_at, supervisor_alive(paths)) == (0, False)


async def test_a_stop_is_on_record_and_a_reboot_takes_it_back(store: StateStore) -> None:
    record = at_rest(store, restart="unless-stopped")
    store.keep(record)
    for asked in (True, False):
        note_stop(store, "c1", asked=asked)
        kept = store.kept("c1")
        assert kept is not None
        assert (store.read("c1").stop_asked, kept.stop_asked) == (asked, asked)


async def test_a_stop_between_the_wait_and_the_start_is_heard(store: StateStore) -> None:
    record = at_rest(store, restart="always")
    assert not await end_policy(store, "c1")
    with pytest.raises(InvalidState, match="somebody has stopped it"):
        store.reclaim(replace(record, state=State.CREATING, restarts=1))
    lock = store.reclaim(replace(record, state=State.CREATING))  # by somebody's start
    assert not store.read("c1").stop_asked
    os.close(lock)
