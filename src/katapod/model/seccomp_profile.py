"""A seccomp profile in the form that Docker, Podman and CRI-O read from files, as frozen values.

It is linux.seccomp of the OCI specification with conditions beside it: rules for some capabilities, architectures or
kernels only. Every key decides what a container may do, so one that is not known is refused. OCI's own form is valid
here too. Source: the documentation of moby's package profiles/seccomp and of containers/common's pkg/seccomp.
"""

import errno
import re
from typing import Any

from katapod.model.oci_json import U32, U64, Part, decode, wrong
from katapod.model.oci_seccomp import Seccomp, SeccompArg, Syscall, check_seccomp

__all__ = [
    "ACTIONS",
    "OPERATORS",
    "ArchMapEntry",
    "Condition",
    "ProfileArg",
    "Rule",
    "SeccompProfile",
    "parse_kernel_version",
    "parse_seccomp_profile",
]

ACTIONS = frozenset(
    f"SCMP_ACT_{name}"
    for name in ("ALLOW", "ERRNO", "KILL", "KILL_PROCESS", "KILL_THREAD", "LOG", "NOTIFY", "TRACE", "TRAP")
)
OPERATORS = frozenset(f"SCMP_CMP_{name}" for name in ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"))


class Condition(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`arches` are Go's names (amd64, x32); `min_kernel` is "MAJOR.MINOR" of the guest's kernel."""

    caps: tuple[str, ...] = ()
    arches: tuple[str, ...] = ()
    min_kernel: str = ""


class ProfileArg(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    index: U64
    value: U64
    value_two: U64 = 0
    op: str


class Rule(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`name` is the old form of one name; `errno` names the number of `errno_ret`, which it is instead of."""

    action: str
    names: tuple[str, ...] = ()
    name: str = ""
    errno_ret: U32 | None = None
    errno: str = ""
    args: tuple[ProfileArg, ...] = ()
    comment: str = ""
    includes: Condition = Condition()
    excludes: Condition = Condition()


class ArchMapEntry(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    architecture: str
    sub_architectures: tuple[str, ...] = ()


class SeccompProfile(Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    default_action: str
    default_errno_ret: U32 | None = None
    default_errno: str = ""
    architectures: tuple[str, ...] = ()
    arch_map: tuple[ArchMapEntry, ...] = ()
    flags: tuple[str, ...] = ()
    syscalls: tuple[Rule, ...] = ()
    listener_path: str = ""
    listener_metadata: str = ""

    def rendered(self, architectures: tuple[str, ...], rules: tuple[Rule, ...]) -> Seccomp:
        """OCI's form, for `architectures` and with `rules` only."""
        return Seccomp(
            default_action=self.default_action,
            default_errno_ret=_number(self.default_errno, self.default_errno_ret),
            architectures=architectures,
            flags=self.flags,
            syscalls=tuple(
                Syscall(
                    names=rule.names or (rule.name,),
                    action=rule.action,
                    errno_ret=_number(rule.errno, rule.errno_ret),
                    args=tuple(
                        SeccompArg(index=arg.index, value=arg.value, value_two=arg.value_two, op=arg.op)
                        for arg in rule.args
                    ),
                )
                for rule in rules
            ),
            listener_path=self.listener_path,
            listener_metadata=self.listener_metadata,
        )


def parse_seccomp_profile(data: bytes, where: str) -> SeccompProfile:
    """Raises SpecError, also for what no guest can have."""
    profile = decode(data, SeccompProfile, where)
    if profile.architectures and profile.arch_map:
        raise wrong(where, "archMap", "architectures is given too: only one of them can be")
    _check_errno(where, "defaultErrno", profile.default_errno, profile.default_errno_ret)
    _one_of(where, "defaultAction", profile.default_action, ACTIONS)
    for index, rule in enumerate(profile.syscalls):
        _check_rule(where, f"syscalls[{index}]", rule)
    check_seccomp(profile.rendered((), profile.syscalls), where, "")
    return profile


_VERSION = re.compile(r"(\d{1,9})\.(\d{1,9})(?:\D.*)?", re.ASCII | re.DOTALL)


def parse_kernel_version(text: str) -> tuple[int, int] | None:
    """Major and minor version of "6.1", "6.1.0-57-cloud-amd64" and the like; None if it is no such text."""
    found = _VERSION.fullmatch(text)
    return (int(found[1]), int(found[2])) if found else None


def _check_rule(where: str, path: str, rule: Rule) -> None:
    if bool(rule.names) == bool(rule.name):
        raise wrong(where, f"{path}.names", "missing" if not rule.names else "name is given too: only one can be")
    _one_of(where, f"{path}.action", rule.action, ACTIONS)
    for index, arg in enumerate(rule.args):
        _one_of(where, f"{path}.args[{index}].op", arg.op, OPERATORS)
    _check_errno(where, f"{path}.errno", rule.errno, rule.errno_ret)
    for name, condition in (("includes", rule.includes), ("excludes", rule.excludes)):
        if condition.min_kernel and parse_kernel_version(condition.min_kernel) is None:
            raise wrong(where, f"{path}.{name}.minKernel", f"{condition.min_kernel!r} is not a version such as 4.8")


def _one_of(where: str, path: str, value: str, known: frozenset[str]) -> None:
    if value not in known:
        raise wrong(where, path, f"{value!r} is not one of {', '.join(sorted(known))}")


def _check_errno(where: str, path: str, name: str, number: int | None) -> None:
    if not name:
        return
    meant: Any = getattr(errno, name, None) if name in errno.errorcode.values() else None
    if meant is None:
        raise wrong(where, path, f"{name!r} is not an error name such as EPERM")
    if number not in (None, meant):
        raise wrong(where, path, f"{name} is {meant}, and the number beside it is {number}")


def _number(name: str, number: int | None) -> int | None:
    return int(getattr(errno, name)) if name else number
