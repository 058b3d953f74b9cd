"""Which sandbox a word on the command line means."""

import json
from pathlib import Path

import msgspec
import pytest

from katapod.host.state import StateStore
from katapod.model.errors import NotFound, UsageError
from katapod.model.layout import Layout
from katapod.model.record import ContainerRecord, SandboxRecord
from katapod.sandbox.lookup import find_sandbox

POD, OTHER = "ab12" + "0" * 60, "ab13" + "0" * 60
SIDECAR, MAIN, OTHER_MAIN = "cd34" + "0" * 60, "cd35" + "0" * 60, "ab12" + "f" * 60


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    """Two pods, containers of `run`, and a machine of the pool."""
    store = StateStore(Layout(state_root=tmp_path))
    records = {POD: (POD, SIDECAR, MAIN), OTHER: (OTHER_MAIN,), "web": ("web",), "abcd": ("abcd",), "pool-1": ()}
    for sandbox_id, containers in records.items():
        state = tmp_path / sandbox_id
        state.mkdir()
        items = tuple(ContainerRecord(each, "busybox", ("true",)) for each in containers)
        pod = sandbox_id in (POD, OTHER)
        record = SandboxRecord(sandbox_id, 0.0, 1, "boot", containers=items, pod=pod, pooled=sandbox_id == "pool-1")
        (state / "persist.json").write_bytes(msgspec.json.encode(record))
    for where, name in ((f"{POD}/{SIDECAR}", "sidecar"), (f"{POD}/{MAIN}", "main"), (f"{OTHER}/{OTHER_MAIN}", "main")):
        annotations = {"io.kubernetes.cri.container-name": name}
        (tmp_path / f"{where}.config.json").write_text(json.dumps({"annotations": annotations}))
    return store


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (POD, (POD, "")),
        (POD[:12], (POD, "")),
        (OTHER[:4], (OTHER, "")),
        ("web", ("web", "")),
        ("abcd", ("abcd", "")),
        (SIDECAR, (POD, SIDECAR)),
        (SIDECAR[:12], (POD, SIDECAR)),
        ("sidecar", (POD, "sidecar")),
        ("ab12", (POD, "")),  # a sandbox wins over a container of another one
    ],
)
def test_names_of_one_sandbox(store: StateStore, text: str, expected: tuple[str, str]) -> None:
    found = find_sandbox(store, text)
    sandbox_id, container_id = expected
    assert (found.record.sandbox_id, found.container_id) == (sandbox_id, container_id.replace("sidecar", SIDECAR))


def test_several_fit(store: StateStore) -> None:
    with pytest.raises(UsageError, match=f"{POD}, {OTHER}"):
        find_sandbox(store, "main")


@pytest.mark.parametrize("text", ["we", "nothing", "ab1", "abc", "ab12ff0", "AB12", "pool"])
def test_none_fits(store: StateStore, text: str) -> None:
    """A beginning has four digits at least, and only the long ids of engines have any."""
    with pytest.raises(NotFound, match=text):
        find_sandbox(store, text)


def test_a_machine_that_is_kept_ready_by_its_whole_name_alone(store: StateStore) -> None:
    assert find_sandbox(store, "pool-1").record.pooled


@pytest.mark.parametrize("text", ["", "../etc", "x" * 65])
def test_no_name(store: StateStore, text: str) -> None:
    with pytest.raises(UsageError):
        find_sandbox(store, text)
