"""Seccomp profiles as engines' files have them: what is read, and what is refused."""

import errno
import json
from typing import Any

import pytest

from katapod.model.errors import SpecError
from katapod.model.seccomp_profile import SeccompProfile, parse_kernel_version, parse_seccomp_profile


def parse(**document: Any) -> SeccompProfile:
    return parse_seccomp_profile(json.dumps({"defaultAction": "SCMP_ACT_ALLOW"} | document).encode(), "p.json")


def rule(**changes: Any) -> dict[str, Any]:
    return {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"} | changes


def test_every_key_that_engines_write_is_known() -> None:
    profile = parse(
        defaultAction="SCMP_ACT_ERRNO",
        defaultErrnoRet=38,
        defaultErrno="ENOSYS",
        archMap=[{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
        flags=["SECCOMP_FILTER_FLAG_LOG"],
        syscalls=[
            rule(args=None, comment="why", includes={}, excludes={"caps": ["CAP_SYS_ADMIN"], "arches": ["s390"]}),
            rule(args=[{"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_MASKED_EQ"}], errno="EPERM"),
            {"name": "ptrace", "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
        ],
    )
    rendered = profile.rendered(("SCMP_ARCH_X86_64",), profile.syscalls)
    assert rendered.default_errno_ret == 38
    assert rendered.flags == ("SECCOMP_FILTER_FLAG_LOG",)
    assert [call.names for call in rendered.syscalls] == [("mkdir",), ("mkdir",), ("ptrace",)]
    assert [call.errno_ret for call in rendered.syscalls] == [None, errno.EPERM, None]


@pytest.mark.parametrize(
    ("document", "cause"),
    [
        (
            {"listenerPath": "/run/x", "syscalls": [rule(action="SCMP_ACT_NOTIFY")]},
            r"syscalls\[0\]\.action: no process",
        ),
        ({"listenerPath": "/run/x"}, "listenerPath: no process"),
        ({"listenerMetadata": "x"}, "listenerMetadata: no process"),
        ({"defaultAction": "SCMP_ACT_NOTIFY"}, "defaultAction: no process"),
        ({"defaultAction": "SCMP_ACT_ALOW"}, "defaultAction: 'SCMP_ACT_ALOW' is not one of"),
        ({"architectures": ["a"], "archMap": [{"architecture": "a"}]}, "archMap: architectures is given too"),
        ({"syscalls": [rule(action="ERRNO")]}, r"syscalls\[0\]\.action: 'ERRNO' is not one of"),
        ({"syscalls": [rule(args=[{"index": 0, "value": 1, "op": "EQ"}])]}, r"args\[0\]\.op: 'EQ' is not one of"),
        ({"syscalls": [rule(names=[])]}, r"syscalls\[0\]\.names: missing"),
        ({"syscalls": [rule(name="mkdir")]}, r"syscalls\[0\]\.names: name is given too"),
        ({"syscalls": [rule(errno="EWHAT")]}, r"syscalls\[0\]\.errno: 'EWHAT' is not an error name"),
        ({"syscalls": [rule(errno="EPERM", errnoRet=38)]}, r"syscalls\[0\]\.errno: EPERM is 1"),
        ({"defaultErrno": "ENOSYS", "defaultErrnoRet": 1}, "defaultErrno: ENOSYS is 38"),
        ({"syscalls": [rule(includes={"minKernel": "new"})]}, r"includes\.minKernel: 'new' is not a version"),
        ({"syscalls": [rule(include={})]}, "unknown field include"),
        ({"syscalls": [rule(includes={"cap": []})]}, "unknown field cap"),
        ({"archmap": []}, "unknown field archmap"),
        ({"defaultAction": None}, "defaultAction: missing"),
    ],
)
def test_what_is_refused(document: dict[str, Any], cause: str) -> None:
    with pytest.raises(SpecError, match=rf"p\.json: (.*\.)?{cause}|p\.json: .*{cause}"):
        parse(**document)


@pytest.mark.parametrize(
    ("text", "version"),
    [("4.8", (4, 8)), ("6.1.0-57-cloud-amd64", (6, 1)), ("3.12-rc5", (3, 12)), ("6", None), ("", None), ("v6.1", None)],
)
def test_kernel_versions(text: str, version: tuple[int, int] | None) -> None:
    assert parse_kernel_version(text) == version
