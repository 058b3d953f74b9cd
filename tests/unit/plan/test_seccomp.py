"""Which rules of a seccomp profile a container gets."""

from typing import Any

import pytest

from katapod.model.errors import SpecError
from katapod.model.seccomp_profile import ArchMapEntry, Condition, Rule, SeccompProfile
from katapod.plan.seccomp import GuestKernel, plan_seccomp, wants_kernel_version

X86 = GuestKernel("x86_64", "6.1.0-57-cloud-amd64")
ADMIN = ("CAP_CHOWN", "CAP_SYS_ADMIN")


def profile(includes: dict[str, Any] | None = None, excludes: dict[str, Any] | None = None) -> SeccompProfile:
    rule = Rule(
        names=("mkdir",),
        action="SCMP_ACT_ERRNO",
        includes=Condition(**(includes or {})),
        excludes=Condition(**(excludes or {})),
    )
    return SeccompProfile(default_action="SCMP_ACT_ALLOW", syscalls=(rule,))


def applies(found: SeccompProfile, capabilities: tuple[str, ...] = (), kernel: GuestKernel = X86) -> bool:
    return bool(plan_seccomp(found, capabilities, kernel).syscalls)


def test_capabilities() -> None:
    for names, has, included, excluded in (
        (("CAP_SYS_ADMIN",), (), False, True),
        (("CAP_SYS_ADMIN",), ADMIN, True, False),
        (("CAP_SYS_ADMIN", "CAP_BPF"), ADMIN, False, False),  # all must be there; one is enough
        ((), ADMIN, True, True),
    ):
        assert applies(profile(includes={"caps": names}), has) is included
        assert applies(profile(excludes={"caps": names}), has) is excluded


def test_architectures() -> None:
    arm = GuestKernel("aarch64", "6.1")
    for kernel, included in ((X86, True), (arm, False)):
        assert applies(profile(includes={"arches": ("amd64", "x32")}), kernel=kernel) is included
        assert applies(profile(excludes={"arches": ("amd64", "x32")}), kernel=kernel) is not included


@pytest.mark.parametrize(("version", "reached"), [("4.8", True), ("6.1", True), ("6.2", False), ("10.0", False)])
def test_kernels(version: str, reached: bool) -> None:
    assert applies(profile(includes={"min_kernel": version})) is reached
    assert applies(profile(excludes={"min_kernel": version})) is not reached


def test_a_kernel_of_unknown_version_is_a_reason_only_where_it_counts() -> None:
    unknown = GuestKernel("x86_64")
    assert not wants_kernel_version(profile())
    assert applies(profile(), kernel=unknown)
    assert wants_kernel_version(profile(excludes={"min_kernel": "4.8"}))
    with pytest.raises(SpecError, match="minKernel"):
        applies(profile(excludes={"min_kernel": "4.8"}), kernel=unknown)


def test_architecture_map() -> None:
    entry = ArchMapEntry(architecture="SCMP_ARCH_X86_64", sub_architectures=("SCMP_ARCH_X86", "SCMP_ARCH_X32"))
    found = SeccompProfile(
        default_action="SCMP_ACT_ALLOW", arch_map=(ArchMapEntry(architecture="SCMP_ARCH_ARM"), entry)
    )
    assert plan_seccomp(found, (), X86).architectures == ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32")
    assert plan_seccomp(found, (), GuestKernel("s390x")).architectures == ()
    plain = SeccompProfile(default_action="SCMP_ACT_ALLOW", architectures=("SCMP_ARCH_X86",))
    assert plan_seccomp(plain, (), X86).architectures == ("SCMP_ARCH_X86",)
