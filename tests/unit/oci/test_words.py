"""Which of the two worlds a command line is of."""

from pathlib import Path

import pytest

from katapod.oci import words as module
from katapod.oci.words import speaks_oci


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "default_root", lambda: str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "create --bundle /b c1",
        "create --pid-file /p c1",
        "start c1",
        "state c1",
        "events c1",
        "events --interval 1s --stats c1",
        "features",
        "--config /x state c1",
        "--root /r kill c1 9",
        "--log /l --log-format json run c1",
        "--systemd-cgroup list",
        "--root=/r --version",
        "run --pid-file /p c1",
        "exec --process /p --detach c1",
        "exec -d --console-socket /s c1",
        "update --resources - c1",
        "--root /r list --format json",
        "--root /r ps --format json c1",
    ],
)
def test_what_engines_write(line: str) -> None:
    assert speaks_oci(line.split())


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--version",
        "--help",
        "create",
        "create busybox",
        "create busybox ls -l",
        "create -it --pull never busybox",
        "create --name web busybox",
        "run busybox",
        "run -d busybox sh -c --pid-file",
        "run --bundle /b",
        "exec c1 ls --detach",
        "exec -i c1 mkdir -p /x",
        "exec -e A=1 c1 cp -d a b",
        "list",
        "list --json",
        "events",
        "events --since 1h -f event=die",
        "list --format json",
        "ps --format {{.Names}}",
        "exec -d c1 sleep 9",
        "update -m 64m c1",
        "kill c1",
        "kill c1 c2",
        "delete --force c1",
        "pause c1",
        "ps",
    ],
)
def test_what_people_write(line: str) -> None:
    assert not speaks_oci(line.split())


@pytest.mark.parametrize(
    "line",
    [
        *("kill c1", "kill c1 15", "delete --force c1", "pause c1", "resume c1", "ps c1", "ps -f json c1"),
        *("exec -d c1 sleep 9", "update --memory 64m c1"),
    ],
)
def test_a_container_of_create_is_the_engines(root: Path, line: str) -> None:
    assert not speaks_oci(line.split())
    (root / "c1").mkdir()
    assert speaks_oci(line.split())


def test_create_in_a_bundle_is_the_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not speaks_oci(["create", "c1"])
    (tmp_path / "config.json").write_text("{}")
    assert speaks_oci(["create", "c1"])


def test_start_of_a_container_of_run_is_ours(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RUNS", str(tmp_path / "sbs"))
    assert speaks_oci(["start", "c1"])
    monkeypatch.setattr(module, "KEPT", str(tmp_path / "kept"))
    for line in ("start c1 c2", "start -a c1", "start --all", "start"):
        assert not speaks_oci(line.split())
    (tmp_path / "kept" / "c2").mkdir(parents=True)
    (tmp_path / "kept" / "c2" / "request.json").touch()
    assert not speaks_oci(["start", "c2"])  # a start of the host has left it
    (tmp_path / "sbs" / "c1").mkdir(parents=True)
    assert not speaks_oci(["start", "c1"])
    (root / "c1").mkdir()
    assert speaks_oci(["start", "c1"])


def test_no_path_is_taken_for_a_container(root: Path) -> None:
    (root / "c1").mkdir()
    assert not speaks_oci(["kill", "../" + root.name + "/c1"])
    assert not speaks_oci(["kill", "."])


def test_a_signal_as_an_option_is_ours(root: Path) -> None:
    (root / "c1").mkdir()
    assert not speaks_oci(["kill", "-s", "TERM", "c1"])
