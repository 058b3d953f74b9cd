"""`kata-runtime volume`: what is printed, kept and refused."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from katapod.cli.settings import Globals
from katapod.cli.volumes import volume
from katapod.host.state import StateStore
from katapod.model.errors import KatapodError
from katapod.model.layout import Layout
from katapod.model.record import ContainerRecord, SandboxRecord


class Here(Globals):
    root = Path()

    @property
    def layout(self) -> Layout:
        return replace(Layout(), volume_root=self.root / "volumes", state_root=self.root / "sbs")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    found = Here()
    monkeypatch.setattr(Here, "root", tmp_path)
    return found


def call(here: Globals, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(volume, words, obj=here, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.return_value or 0, done.output


def test_a_volume_s_life(here: Here) -> None:
    assert call(here, "create", "-l", "a=b", "db") == (0, "db\n")
    assert call(here, "create", "db") == (0, "db\n")
    assert call(here, "ls", "-q") == (0, "db\n")
    assert call(here, "ls", "--format", "{{.Name}} {{.Containers}}") == (0, "db 0\n")
    (found,) = json.loads(call(here, "inspect", "db")[1])
    assert (found["Name"], found["Labels"], found["Mountpoint"]) == (
        "db",
        {"a": "b"},
        f"{here.root}/volumes/db/_data",
    )
    assert call(here, "inspect", "-f", "{{.Mountpoint}}", "db")[1] == f"{here.root}/volumes/db/_data\n"
    assert call(here, "ls", "-q", "-f", "name=d", "-f", "dangling=true") == (0, "db\n")
    assert call(here, "ls", "-q", "-f", "label=none") == (0, "")
    assert call(here, "inspect", "-f", "{{.Name}}", "none", "db")[0] == 1
    assert call(here, "rm", "db") == (0, "db\n")
    assert call(here, "rm", "db")[0] == 1
    assert call(here, "rm", "-f", "db")[0] == 0


def test_a_volume_that_a_container_has_stays(here: Here) -> None:
    call(here, "create", "db")
    container = ContainerRecord("c1", "busybox", ("sh",), volumes=("db",))
    StateStore(here.layout).create(SandboxRecord("c1", 0.0, 1, "boot", containers=(container,)))
    status, said = call(here, "rm", "db")
    assert status == 1
    assert "c1 has it" in said
    assert call(here, "prune", "-fa") == (0, "")
    assert call(here, "ls", "-q") == (0, "db\n")


def test_prune_leaves_named_ones_unless_it_is_told(here: Here) -> None:
    call(here, "create", "db")
    anonymous = call(here, "create")[1].strip()
    assert len(anonymous) == 64
    assert call(here, "prune", "-f") == (0, "")
    with pytest.raises(KatapodError, match="standard input is not a terminal"):
        call(here, "prune", "--all")
    assert set(call(here, "prune", "-f", "-a")[1].split()) == {"db", anonymous}


@pytest.mark.parametrize(
    "words", [("create", "a/b"), ("create", "-d", "nfs"), ("create", "-o", "x=y"), ("ls", "-f", "x=y")]
)
def test_refused(here: Here, words: tuple[str, ...]) -> None:
    with pytest.raises(KatapodError):
        call(here, *words)
