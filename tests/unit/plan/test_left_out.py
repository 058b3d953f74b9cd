"""What of a spec a guest goes without: all of it is named, and only what somebody has asked for is a warning."""

import json
from typing import Any

import pytest

from katapod.model import oci
from katapod.plan.left_out import left_out


def gaps(process: dict[str, Any] | None = None, **linux: Any) -> dict[str, bool]:
    document = {
        "ociVersion": "1.2.0",
        "process": {"args": ["sh"], "cwd": "/"} | (process or {}),
        "root": {"path": "/r"},
        "linux": linux,
    }
    data = json.dumps(document).encode()
    spec = oci.parse_spec(data)
    return {gap.place: gap.matters for gap in left_out(spec, oci.unknown_keys(data, spec))}


@pytest.mark.parametrize(
    ("profile", "matters"),
    [
        ("cri-containerd.apparmor.d", False),
        ("crio-default", False),
        ("docker-default", False),
        ("containers-default-0.50.1", False),
        ("my-profile", True),
    ],
)
def test_apparmor(profile: str, matters: bool) -> None:
    assert gaps({"apparmorProfile": profile}) == {"process.apparmorProfile": matters}


def test_what_engines_always_write_is_no_gap() -> None:
    resources = {
        "memory": {"disableOOMKiller": False, "limit": 1 << 26},
        "cpu": {"realtimeRuntime": 0, "shares": 2},
        "blockIO": {"weight": 0},
        "network": {},
        "unified": {"memory.oom.group": "1"},
    }
    assert gaps(resources=resources, timeOffsets={}, intelRdt=None) == {}


def test_what_somebody_asked_for_is() -> None:
    resources = {
        "memory": {"swappiness": 0, "disableOOMKiller": True, "kernel": 1, "kernelTCP": 1},
        "cpu": {"realtimeRuntime": 1, "cpus": "0", "mems": "0"},
        "blockIO": {"weight": 10},
        "network": {"classID": 1},
        "rdma": {"mlx": {"hcaHandles": 1}},
    }
    prefix = "linux.resources."
    assert gaps(
        {"selinuxLabel": "l", "execCPUAffinity": {"initial": "0"}},
        resources=resources,
        mountLabel="l",
        intelRdt={"closID": "gold"},
        memoryPolicy={"mode": "MPOL_BIND"},
        seccomp={"defaultAction": "SCMP_ACT_ALLOW", "archMap": [1], "syscalls": []},
        newKey={"a": 1},
    ) == {
        "process.selinuxLabel": False,
        "process.execCPUAffinity": True,
        "linux.mountLabel": False,
        "linux.intelRdt": True,
        "linux.intelRdt.closID": True,
        "linux.memoryPolicy": True,
        "linux.seccomp.archMap": True,
        "linux.newKey": False,
        f"{prefix}memory.swappiness": True,
        f"{prefix}memory.disableOOMKiller": True,
        f"{prefix}memory.kernel": True,
        f"{prefix}memory.kernelTCP": True,
        f"{prefix}cpu.realtimeRuntime": True,
        f"{prefix}cpu.cpus": False,
        f"{prefix}cpu.mems": False,
        f"{prefix}blockIO": True,
        f"{prefix}network": True,
        f"{prefix}rdma": True,
    }
