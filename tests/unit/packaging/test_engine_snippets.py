"""The configuration snippets for container engines: TOML, with what each engine needs."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from katapod.shim.version import RUNTIME_NAME

PACKAGING = Path(__file__).parents[3] / "packaging"


@pytest.mark.parametrize(
    ("name", "version", "plugin"),
    [("kata.toml", 2, "io.containerd.grpc.v1.cri"), ("kata-v3.toml", 3, "io.containerd.cri.v1.runtime")],
)
def test_containerd(name: str, version: int, plugin: str) -> None:
    found = tomllib.loads((PACKAGING / "containerd" / name).read_text())
    assert found["version"] == version
    handler: dict[str, Any] = found["plugins"][plugin]["containerd"]["runtimes"]["kata"]
    assert handler["runtime_type"] == RUNTIME_NAME
    assert handler["privileged_without_host_devices"] is True
    assert handler["pod_annotations"] == handler["container_annotations"] == ["io.katacontainers.*"]


def test_crio() -> None:
    found = tomllib.loads((PACKAGING / "crio" / "50-kata").read_text())["crio"]["runtime"]["runtimes"]["kata"]
    assert found == {
        "runtime_path": "/usr/bin/containerd-shim-kata-v2",
        "runtime_type": "vm",
        "runtime_root": "/run/vc",
        "privileged_without_host_devices": True,
    }
