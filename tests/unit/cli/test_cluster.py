"""`kata-runtime cluster status`, with a kubectl that says what a test wants."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from katapod.cli.main import call, load_command
from katapod.cli.settings import Globals
from katapod.model.errors import KatapodError, MissingProgram, NotFound

NODE = {
    "name": "node-a",
    "phase": "Ready",
    "accelerator": "kvm",
    "target": "0.1.0",
    "proofSeconds": 1.25,
    "message": "",
}
CONDITION = {
    "type": "Ready",
    "status": "True",
    "reason": "AllNodesReady",
    "message": "1 of 1 nodes are ready",
    "lastTransitionTime": "2026-01-01T00:00:00Z",
    "observedGeneration": 1,
}
STATUS = {
    "summary": "1 of 1 nodes are ready",
    "conditions": [CONDITION],
    "nodes": [NODE],
    "runtimeClasses": ["kata"],
    "newer": "than we are",
}


def kubectl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    program = tmp_path / "kubectl"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *items: Any) -> None:
    (tmp_path / "answer").write_text(json.dumps({"items": items}))
    kubectl(monkeypatch, tmp_path, f"cat {tmp_path}/answer")


def show(*words: str) -> int:
    return call(load_command("cluster"), ["cluster", "status", *words], obj=Globals())


def test_conditions_and_nodes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says(monkeypatch, tmp_path, {"metadata": {"name": "kata"}, "status": STATUS})
    assert show() == 0
    assert capsys.readouterr().out == (
        "kata: 1 of 1 nodes are ready\n"
        "RuntimeClasses: kata\n"
        "\n"
        "CONDITION  STATUS  SINCE                 WHY\n"
        "Ready      True    2026-01-01T00:00:00Z  AllNodesReady: 1 of 1 nodes are ready\n"
        "\n"
        "NODE    PHASE  BY   VERSION  PROOF  MESSAGE\n"
        "node-a  Ready  kvm  0.1.0    1.2 s\n"
    )


def test_the_back_end_and_whether_it_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = {**STATUS, "backend": "MachineConfig", "waitingForMcoToStart": True}
    says(monkeypatch, tmp_path, {"metadata": {"name": "kata"}, "status": status})
    assert show() == 0
    told = "Back end: MachineConfig; the machine-config operator has not answered the last change yet"
    assert capsys.readouterr().out.splitlines()[1] == told


def test_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says(monkeypatch, tmp_path, {"metadata": {"name": "kata"}, "status": STATUS})
    assert show("--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["status"]["nodes"][0]["phase"] == "Ready"


def test_one_that_nobody_has_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says(monkeypatch, tmp_path, {"metadata": {"name": "kata"}})
    assert show() == 0
    assert capsys.readouterr().out == "kata: no operator has seen it yet\n"


def test_nodes_that_the_status_has_no_room_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says(monkeypatch, tmp_path, {"metadata": {"name": "kata"}, "status": {**STATUS, "nodesOmitted": 950}})
    assert show() == 0
    assert "and 950 nodes more; kubectl get nodes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "error", "hint"),
    [
        ("""echo '{"items": []}'""", NotFound, "operator.md"),
        ("echo the server doesn\\'t have a resource type >&2; exit 1", KatapodError, "the operator is not installed"),
        ("echo connection refused >&2; exit 1", KatapodError, ""),
        ("echo no JSON", KatapodError, ""),
    ],
)
def test_what_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, error: type[KatapodError], hint: str
) -> None:
    kubectl(monkeypatch, tmp_path, script)
    with pytest.raises(error) as raised:
        show()
    assert hint in raised.value.hint


def test_without_kubectl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingProgram, match="kubectl"):
        show()
