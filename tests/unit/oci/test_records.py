"""What is on disk about containers, and what is made of it when their supervisor has ended."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from katapod.oci.errors import OciError
from katapod.oci.records import Record, State, Store, SupervisorDir


def state(**changes: object) -> State:
    return {"id": "c1", "status": "running", "pid": 7, "sandbox": "vm1", "netns": "4:5", "cgroups": [], **changes}


@pytest.fixture
def living(tmp_path: Path) -> SupervisorDir:
    """A supervisor of vm1 that holds its lock."""
    place = SupervisorDir(str(tmp_path), "vm1")
    os.mkdir(place.path)
    fd = os.open(place.lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return place


def test_an_id_is_taken_once(tmp_path: Path) -> None:
    Record(str(tmp_path), "c1").claim(state())
    with pytest.raises(OciError, match="container with given ID already exists"):
        Record(str(tmp_path), "c1").claim(state())


def test_two_roots_are_two_worlds(tmp_path: Path) -> None:
    Record(str(tmp_path / "a"), "c1").claim(state())
    Record(str(tmp_path / "b"), "c1").claim(state())


def test_a_living_supervisor_is_believed(tmp_path: Path, living: SupervisorDir) -> None:
    record = Record(str(tmp_path), "c1")
    record.claim(state())
    assert (record.read()["status"], record.read()["pid"]) == ("running", 7)


def test_with_its_supervisor_a_container_has_stopped(tmp_path: Path) -> None:
    record = Record(str(tmp_path), "c1")
    record.claim(state())
    assert (record.read()["status"], record.read()["pid"]) == ("stopped", 0)


def test_a_directory_without_a_state_can_be_looked_at(tmp_path: Path) -> None:
    record = Record(str(tmp_path), "c1")
    os.mkdir(record.path)
    assert record.read()["status"] == "stopped"
    (tmp_path / "c1/state.json").write_text("{")
    assert record.read()["status"] == "stopped"


def test_none_of_that_name(tmp_path: Path) -> None:
    with pytest.raises(OciError, match="does not exist"):
        Record(str(tmp_path), "c1").read()


@pytest.mark.parametrize("text", ["", ".", "..", ".x", "a/b", "-x", "a\0", "ä", "a" * 1025])
def test_what_is_no_id(tmp_path: Path, text: str) -> None:
    with pytest.raises(OciError, match="invalid container ID"):
        Store(str(tmp_path)).record(text)


def test_only_containers_are_listed(tmp_path: Path, living: SupervisorDir) -> None:
    Record(str(tmp_path), "c2").claim(state())
    Record(str(tmp_path), "c1").claim(state())
    assert [record.id for record in Store(str(tmp_path)).records()] == ["c1", "c2"]
    assert Store(str(tmp_path / "none")).records() == []


def test_who_shares_a_network_namespace(tmp_path: Path, living: SupervisorDir) -> None:
    store = Store(str(tmp_path))
    Record(str(tmp_path), "c1").claim(state())
    Record(str(tmp_path), "c2").claim(state(sandbox="dead", netns="4:6"))
    found = store.sharing("4:5")
    assert found is not None
    assert found["sandbox"] == "vm1"
    assert store.sharing("4:6") is None  # its VM has ended
    assert store.sharing("4:7") is None


def test_a_vm_has_the_containers_id_where_that_is_nobody_elses(tmp_path: Path, living: SupervisorDir) -> None:
    store, usual = Store(str(tmp_path)), str(tmp_path)
    assert store.new_sandbox("c1", usual) == "c1"
    assert store.new_sandbox("a" * 64, "/elsewhere") == "a" * 64
    for taken, root in (("c1", "/elsewhere"), ("vm1", usual), ("x", usual), ("a+b", usual), ("a" * 65, usual)):
        name = store.new_sandbox(taken, root)
        assert name != taken
        assert len(name) <= 64


def test_what_a_killed_supervisor_left_is_in_nobodys_way(tmp_path: Path) -> None:
    place = SupervisorDir(str(tmp_path), "c1")
    os.mkdir(place.path)
    assert Store(str(tmp_path)).new_sandbox("c1", str(tmp_path)) == "c1"
    assert not os.path.exists(place.path)


def test_a_state_is_never_seen_by_half(tmp_path: Path) -> None:
    record = Record(str(tmp_path), "c1")
    record.claim(state())
    record.write(state(status="paused"))
    assert os.listdir(record.path) == ["state.json"]
    assert json.loads((tmp_path / "c1/state.json").read_text())["status"] == "paused"
