"""config.json for crun, from the protocol's messages."""

from __future__ import annotations

import pytest

from katapod.agent.spec import cgroup_path, process_json, resources_json, spec_json
from katapod.rpc.pb import oci_pb2

SHARED = {"ipc": "/var/run/sandbox-ns/ipc", "uts": "/var/run/sandbox-ns/uts"}


def make_spec() -> oci_pb2.Spec:
    spec = oci_pb2.Spec(Version="1.0.2", Hostname="pod")
    spec.Process.Args.append("sh")
    spec.Root.Readonly = True
    for kind in ("ipc", "uts", "mount", "network"):
        spec.Linux.Namespaces.add(Type=kind, Path="/host/path" if kind == "ipc" else "")
    return spec


def test_namespaces_are_the_guests() -> None:
    config = spec_json(make_spec(), "/b/rootfs", "/c1", SHARED)
    assert config["linux"]["namespaces"] == [
        {"type": "ipc", "path": SHARED["ipc"]},
        {"type": "uts", "path": SHARED["uts"]},
        {"type": "mount"},
        {"type": "pid"},
        {"type": "cgroup"},
    ]
    assert config["root"] == {"path": "/b/rootfs", "readonly": True}


def test_hostname_only_without_a_shared_uts_namespace() -> None:
    assert "hostname" not in spec_json(make_spec(), "/r", "/c", SHARED)
    assert spec_json(make_spec(), "/r", "/c", {})["hostname"] == "pod"


def test_device_rules_default_to_denial_plus_the_given_devices() -> None:
    spec = make_spec()
    spec.Linux.Devices.add(Path="/dev/vdx", Type="b", Major=254, Minor=3, FileMode=0o60660)
    config = spec_json(spec, "/r", "/c", {})
    assert config["linux"]["resources"]["devices"] == [
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "b", "major": 254, "minor": 3, "access": "rwm"},
    ]
    assert config["linux"]["devices"][0]["fileMode"] == 0o660


def test_process_keeps_what_confines_it() -> None:
    process = oci_pb2.Process(Args=["a"], Cwd="", NoNewPrivileges=True, OOMScoreAdj=-5, Terminal=True)
    process.Capabilities.Bounding.append("CAP_KILL")
    process.Rlimits.add(Type="RLIMIT_NOFILE", Hard=2, Soft=1)
    process.User.AdditionalGids.extend([4, 5])
    process.ConsoleSize.Height, process.ConsoleSize.Width = 24, 80
    assert process_json(process) == {
        "terminal": True,
        "consoleSize": {"height": 24, "width": 80},
        "user": {"uid": 0, "gid": 0, "additionalGids": [4, 5]},
        "args": ["a"],
        "env": [],
        "cwd": "/",
        "noNewPrivileges": True,
        "oomScoreAdj": -5,
        "capabilities": {
            "bounding": ["CAP_KILL"],
            "effective": [],
            "inheritable": [],
            "permitted": [],
            "ambient": [],
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 2, "soft": 1}],
    }


def test_empty_capabilities_are_not_the_same_as_none_given() -> None:
    process = oci_pb2.Process(Args=["a"])
    assert "capabilities" not in process_json(process)
    process.Capabilities.SetInParent()
    assert process_json(process)["capabilities"]["bounding"] == []


def test_seccomp_errno_zero_is_kept() -> None:
    spec = make_spec()
    spec.Linux.Seccomp.DefaultAction = "SCMP_ACT_ERRNO"
    rule = spec.Linux.Seccomp.Syscalls.add(Names=["mount"], Action="SCMP_ACT_ERRNO", errnoret=0)
    rule.Args.add(Index=0, Value=1, ValueTwo=2, Op="SCMP_CMP_EQ")
    spec.Linux.Seccomp.Syscalls.add(Names=["read"], Action="SCMP_ACT_ALLOW")
    calls = spec_json(spec, "/r", "/c", {})["linux"]["seccomp"]["syscalls"]
    assert calls[0]["errnoRet"] == 0
    assert calls[0]["args"] == [{"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_EQ"}]
    assert "errnoRet" not in calls[1]


def test_resources_leave_out_what_is_not_set() -> None:
    resources = oci_pb2.LinuxResources()
    assert resources_json(resources) == {}
    resources.Memory.Limit, resources.Memory.Swap = 1 << 20, -1
    resources.CPU.Quota, resources.CPU.Period = 50000, 100000
    resources.Pids.Limit = 10
    assert resources_json(resources) == {
        "memory": {"limit": 1 << 20, "swap": -1},
        "cpu": {"quota": 50000, "period": 100000},
        "pids": {"limit": 10},
    }


@pytest.mark.parametrize(
    ("asked", "path"),
    [
        ("", "/c1"),
        ("/", "/c1"),
        ("system.slice:crio:c1", "/c1"),
        ("/../../etc", "/c1"),
        ("relative/path", "/c1"),
        ("/kubepods//pod1/./c1/", "/kubepods/pod1/c1"),
    ],
)
def test_cgroup_path(asked: str, path: str) -> None:
    assert cgroup_path("c1", asked) == path
