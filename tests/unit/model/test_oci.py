"""config.json: parsing, checks, encoding."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from katapod.model import oci, oci_json
from katapod.model.errors import SpecError


def document(**changes: Any) -> dict[str, Any]:
    """A small valid config.json; `changes` replace top-level keys, None removes one."""
    base: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/"},
        "root": {"path": "rootfs"},
    }
    return {key: value for key, value in (base | changes).items() if value is not None}


def process(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = document()["process"] | changes
    return {key: value for key, value in found.items() if value is not None}


def parse(raw: object) -> oci.Spec:
    return oci.parse_spec(json.dumps(raw).encode())


FULL: dict[str, Any] = {
    "ociVersion": "1.1.0",
    "process": {
        "terminal": True,
        "consoleSize": {"height": 24, "width": 80},
        "user": {"uid": 1, "gid": 2, "additionalGids": [3, 4], "umask": 18},
        "args": ["sh", "-c", "id"],
        "env": ["A=1"],
        "cwd": "/srv",
        "capabilities": {name: ["CAP_KILL"] for name in ("bounding", "effective", "permitted")},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 2**64 - 1, "soft": 1024}],
        "noNewPrivileges": True,
        "apparmorProfile": "x",
        "oomScoreAdj": -5,
        "selinuxLabel": "y",
    },
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "web",
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/data", "type": "bind", "source": "/srv/a b/ü", "options": ["rbind", "ro"]},
    ],
    "hooks": {
        name: [{"path": "/bin/true", "args": ["true"], "env": ["A=1"], "timeout": 3}]
        for name in ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
    },
    "annotations": {"a.b/c": "d"},
    "linux": {
        "uidMappings": [{"hostID": 1000, "containerID": 0, "size": 10}],
        "gidMappings": [{"hostID": 1000, "containerID": 0, "size": 10}],
        "sysctl": {"kernel.shmmax": "1"},
        "cgroupsPath": "/a/b",
        "namespaces": [{"type": "pid"}, {"type": "ipc", "path": "/proc/1/ns/ipc"}],
        "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "fileMode": 438, "uid": 0, "gid": 0}],
        "resources": {
            "devices": [{"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1, "minor": 3}],
            "memory": {
                "limit": 1 << 30,
                "reservation": 1,
                "swap": -1,
                "kernel": 2,
                "kernelTCP": 3,
                "swappiness": 60,
                "disableOOMKiller": True,
            },
            "cpu": {
                "shares": 1024,
                "quota": 150000,
                "period": 100000,
                "realtimeRuntime": 1,
                "realtimePeriod": 2,
                "cpus": "0-1",
                "mems": "0",
            },
            "pids": {"limit": 100},
            "blockIO": {
                "weight": 10,
                "leafWeight": 11,
                "weightDevice": [{"major": 8, "minor": 0, "weight": 5, "leafWeight": 6}],
                "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 600}],
                "throttleWriteBpsDevice": [{"major": 8, "minor": 0, "rate": 601}],
                "throttleReadIOPSDevice": [{"major": 8, "minor": 0, "rate": 602}],
                "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 603}],
            },
            "hugepageLimits": [{"pageSize": "2MB", "limit": 1 << 21}],
            "network": {"classID": 7, "priorities": [{"name": "eth0", "priority": 500}]},
        },
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 1,
            "architectures": ["SCMP_ARCH_X86_64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [
                {
                    "names": ["mkdir"],
                    "action": "SCMP_ACT_ERRNO",
                    "errnoRet": 95,
                    "args": [{"index": 0, "value": 2**64 - 1, "valueTwo": 1, "op": "SCMP_CMP_EQ"}],
                }
            ],
        },
        "rootfsPropagation": "slave",
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
        "mountLabel": "z",
        "intelRdt": {"l3CacheSchema": "L3:0=f"},
    },
}


def test_every_field_survives_parsing_and_encoding() -> None:
    spec = parse(FULL)
    assert json.loads(oci.encode_spec(spec)) == FULL
    assert oci.parse_spec(oci.encode_spec(spec)) == spec
    assert oci.unknown_keys(json.dumps(FULL).encode(), spec) == ()


def test_a_minimal_spec_has_usable_defaults() -> None:
    spec = parse(document())
    assert spec.process.user == oci.User(uid=0, gid=0)
    assert spec.linux.namespaces == ()
    assert spec.memory_limit is None
    assert spec.cpu_limit is None


def test_the_user_is_always_written_because_crun_wants_it() -> None:
    spec = parse(document(process=process(user=None)))
    assert json.loads(oci.encode_spec(spec))["process"]["user"]["uid"] == 0


def test_limits() -> None:
    spec = parse(FULL)
    assert spec.memory_limit == 1 << 30
    assert spec.cpu_limit == 1.5
    unlimited = {"resources": {"memory": {"limit": -1}, "cpu": {"quota": -1, "period": 100000}}}
    spec = parse(document(linux=unlimited))
    assert spec.memory_limit is None
    assert spec.cpu_limit is None
    spec = parse(document(linux={"resources": {"cpu": {"quota": 50000}}}))
    assert spec.cpu_limit == 0.5


def test_unknown_keys_are_ignored_and_can_be_listed() -> None:
    raw = document(future={"a": 1}, mounts=[{"destination": "/a", "idmap": True}])
    data = json.dumps(raw).encode()
    assert oci.unknown_keys(data, oci.parse_spec(data)) == ("future", "mounts[0].idmap")


def test_null_means_absent() -> None:
    raw = document(mounts=None, process=process(env=None))
    with_nulls = raw | {"mounts": None, "process": raw["process"] | {"env": None, "capabilities": None}}
    assert parse(with_nulls) == parse(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (document(process=None), "config.json: process: missing"),
        (document(process=None) | {"process": None}, "config.json: process: missing"),
        (document(root=None), "config.json: root: missing"),
        (document(ociVersion=None), "config.json: ociVersion: missing"),
        (document(ociVersion="2.0.0"), "ociVersion: '2.0.0' is not supported"),
        (document(process=process(args="sh")), "config.json: process.args: expected array, got str"),
        (document(process=process(args=["sh", 1])), "process.args[1]: expected str, got int"),
        (document(process=process(args=None)), "process.args: missing"),
        (document(process=process(args=[])), "process.args: is empty"),
        (document(process=process(args=[""])), "process.args[0]: is empty"),
        (document(process=process(args=["a\0b"])), "process.args[0]: has a NUL character"),
        (document(process=process(cwd="srv")), "process.cwd: 'srv' is not an absolute path"),
        (document(process=process(user={"uid": -1})), "process.user.uid: expected int >= 0"),
        (document(process=process(user={"uid": 2**32})), "process.user.uid: expected int <= 4294967295"),
        (
            document(process=process(rlimits=[{"type": "RLIMIT_CORE", "hard": 1, "soft": 2}])),
            "process.rlimits[0].soft: 2 exceeds the hard limit 1",
        ),
        (
            document(process=process(rlimits=[{"type": "RLIMIT_CORE", "hard": 2**64, "soft": 2}])),
            "process.rlimits[0].hard: 18446744073709551616 is more than 64 bits",
        ),
        (
            document(process=process(rlimits=[{"type": "RLIMIT_CORE", "hard": 1, "soft": 1}] * 2)),
            "process.rlimits[1].type: 'RLIMIT_CORE' occurs twice",
        ),
        (document(root={"path": ""}), "root.path: is empty"),
        (document(root={"path": "../other"}), "root.path: '../other' has a '..' component"),
        (document(root={"path": "/a/../b"}), "root.path: '/a/../b' has a '..' component"),
        (document(mounts=[{"destination": "a"}]), "mounts[0].destination: 'a' is not an absolute path"),
        (document(mounts=[{"destination": "/a/.."}]), "mounts[0].destination: '/a/..' has a '..' component"),
        (document(linux={"maskedPaths": ["/proc/../x"]}), "linux.maskedPaths[0]: '/proc/../x' has a '..'"),
        (document(linux={"readonlyPaths": ["x"]}), "linux.readonlyPaths[0]: 'x' is not an absolute path"),
        (document(linux={"devices": [{"path": "/../x", "type": "c"}]}), "linux.devices[0].path: '/../x' has"),
        (document(linux={"namespaces": [{"type": "pids"}]}), "linux.namespaces[0].type: 'pids' is not a"),
        (document(linux={"namespaces": [{"type": "pid"}] * 2}), "linux.namespaces[1].type: 'pid' occurs twice"),
        ([], "config.json: expected object, got array"),
    ],
)
def test_errors_name_the_place(raw: object, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(raw)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"hello", b"\xff\xfe", b'{"ociVersion": "\xff"}', b"[" * 100_000, b'{"a": 1} x']
)
def test_what_is_not_json_is_said_to_be_so(data: bytes) -> None:
    with pytest.raises(SpecError, match=r"bundle/config\.json: it is not JSON"):
        oci.parse_spec(data, "bundle/config.json")


def test_size_is_limited_before_parsing() -> None:
    with pytest.raises(SpecError, match="more than"):
        oci.parse_spec(b" " * (oci_json.MAX_SPEC_BYTES + 1))


@settings(max_examples=50)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_spec_or_a_spec_error(data: bytes) -> None:
    with pytest.raises(SpecError):
        oci.parse_spec(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=50)
@given(key=st.sampled_from(sorted(FULL["linux"])), value=json_values)
def test_a_wrong_value_anywhere_gives_a_spec_error_only(key: str, value: Any) -> None:
    try:
        spec = parse(document(linux={key: value}))
    except SpecError:
        return
    assert oci.parse_spec(oci.encode_spec(spec)) == spec


def bundle(raw: object) -> oci.Spec:
    return oci.parse_bundle_spec(json.dumps(raw).encode(), "/b/one")


@pytest.mark.parametrize(
    ("path", "resolved"),
    [("rootfs", "/b/one/rootfs"), ("./a//b", "/b/one/a/b"), (".", "/b/one"), ("/srv/root", "/srv/root")],
)
def test_root_is_resolved_against_the_bundle(path: str, resolved: str) -> None:
    assert bundle(document(root={"path": path, "readonly": True})).root == oci.Root(path=resolved, readonly=True)


def test_bind_sources_are_resolved_against_the_bundle() -> None:
    mounts = [
        {"destination": "/a", "type": "bind", "source": "data"},
        {"destination": "/b", "source": "./x", "options": ["rbind"]},
        {"destination": "/c", "type": "bind", "source": "/srv"},
        {"destination": "/d", "type": "tmpfs", "source": "tmpfs"},
    ]
    found = [mount.source for mount in bundle(document(mounts=mounts)).mounts]
    assert found == ["/b/one/data", "/b/one/x", "/srv", "tmpfs"]


@pytest.mark.parametrize(("source", "cause"), [("../x", "has a '..' component"), ("", "needs one")])
def test_bind_sources_cannot_leave_the_bundle(source: str, cause: str) -> None:
    with pytest.raises(SpecError, match=r"mounts\[0\]\.source: .*" + cause):
        bundle(document(mounts=[{"destination": "/a", "type": "bind", "source": source}]))


def test_exec_process() -> None:
    assert oci.parse_process(json.dumps(process()).encode()).args == ("sh",)
    with pytest.raises(SpecError, match=r"process\.json: args: is empty"):
        oci.parse_process(json.dumps(process(args=[])).encode())
    with pytest.raises(SpecError, match=r"process\.json: ioPriority: crun does not know"):
        oci.parse_process(json.dumps(process(ioPriority={"class": "IOPRIO_CLASS_IDLE"})).encode())


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"process": process(scheduler={"policy": "SCHED_FIFO"})}, "process.scheduler"),
        ({"linux": {"timeOffsets": {"monotonic": {"secs": 1}}}}, "linux.timeOffsets"),
        ({"linux": {"netDevices": {"eth1": {}}}}, "linux.netDevices"),
        ({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_NOTIFY"}}}, "linux.seccomp.defaultAction"),
        ({"linux": {"seccomp": {"defaultAction": "x", "listenerPath": "/run/x"}}}, "linux.seccomp.listenerPath"),
        (
            {"mounts": [{"destination": "/a", "uidMappings": [{"containerID": 0, "hostID": 1, "size": 1}]}]},
            "mounts[0].uidMappings",
        ),
    ],
)
def test_what_the_specification_knows_and_no_guest_can_have_is_refused(changes: dict[str, Any], place: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(document(**changes))
    assert f": {place}: " in str(caught.value)
    assert caught.value.hint == "remove it"


def test_public_names_exist() -> None:
    assert all(hasattr(oci, name) for name in oci.__all__)
