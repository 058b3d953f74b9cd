"""From a seccomp profile with conditions to the filter that a container gets. Pure.

Docker's rules: `includes` must all hold, one of `excludes` is enough; capabilities are those of the bounding set; an
archMap without the machine's architecture leaves the filter to that architecture alone. The kernel in question is the
guest's, whose system calls are filtered. Source: the documentation of moby's package profiles/seccomp.
"""

from msgspec import Struct

from katapod.model.errors import SpecError
from katapod.model.image import parse_platform
from katapod.model.oci_seccomp import Seccomp
from katapod.model.seccomp_profile import Condition, SeccompProfile, parse_kernel_version

__all__ = ["GuestKernel", "plan_seccomp", "wants_kernel_version"]

_SECCOMP_NAMES = {
    "386": "SCMP_ARCH_X86",
    "amd64": "SCMP_ARCH_X86_64",
    "arm": "SCMP_ARCH_ARM",
    "arm64": "SCMP_ARCH_AARCH64",
    "ppc64le": "SCMP_ARCH_PPC64LE",
    "riscv64": "SCMP_ARCH_RISCV64",
    "s390x": "SCMP_ARCH_S390X",
}
"""Go's names of architectures, and libseccomp's."""


class GuestKernel(Struct, frozen=True):
    """`machine` as uname(2) has it; an empty `release`: it is not known."""

    machine: str
    release: str = ""


def wants_kernel_version(profile: SeccompProfile) -> bool:
    return any(condition.min_kernel for rule in profile.syscalls for condition in (rule.includes, rule.excludes))


def plan_seccomp(profile: SeccompProfile, capabilities: tuple[str, ...], kernel: GuestKernel) -> Seccomp:
    """The filter for a container with `capabilities` in its bounding set.

    Raises SpecError if a rule depends on the kernel's version and that is not known.
    """
    architecture = parse_platform(kernel.machine).architecture
    release = parse_kernel_version(kernel.release)
    if release is None and wants_kernel_version(profile):
        raise SpecError(
            "cannot apply the seccomp profile: it has rules for some versions of the kernel (minKernel), and the "
            f"version of the guest's {kernel.release!r} is not known",
            hint="use the kernel that image build makes, or leave minKernel out of the profile",
        )
    has = frozenset(capabilities)
    rules = tuple(
        rule
        for rule in profile.syscalls
        if _includes(rule.includes, has, architecture, release)
        and not _excludes(rule.excludes, has, architecture, release)
    )
    return profile.rendered(_architectures(profile, architecture), rules)


def _includes(condition: Condition, has: frozenset[str], architecture: str, release: tuple[int, int] | None) -> bool:
    return (
        has.issuperset(condition.caps)
        and (not condition.arches or architecture in condition.arches)
        and not _is_older(release, condition.min_kernel)
    )


def _excludes(condition: Condition, has: frozenset[str], architecture: str, release: tuple[int, int] | None) -> bool:
    return (
        not has.isdisjoint(condition.caps)
        or architecture in condition.arches
        or (bool(condition.min_kernel) and not _is_older(release, condition.min_kernel))
    )


def _is_older(release: tuple[int, int] | None, wanted: str) -> bool:
    """Whether `wanted` is given, and the kernel has not reached it."""
    least = parse_kernel_version(wanted)
    return least is not None and release is not None and release < least


def _architectures(profile: SeccompProfile, architecture: str) -> tuple[str, ...]:
    native = _SECCOMP_NAMES.get(architecture, "")
    for entry in profile.arch_map:
        if entry.architecture == native:
            return (entry.architecture, *entry.sub_architectures)
    return profile.architectures
