"""virtiofsd's command line, in both implementations: QEMU's C program (to QEMU 7.2) and the Rust one after it."""

from enum import Enum
from pathlib import Path

from msgspec import Struct

__all__ = ["VirtiofsdImplementation", "VirtiofsdPlan", "parse_implementation", "plan_virtiofsd", "render_virtiofsd"]


class VirtiofsdImplementation(Enum):
    C = "c"
    RUST = "rust"


class VirtiofsdPlan(Struct, frozen=True):
    program: str
    implementation: VirtiofsdImplementation | None  # None: whoever starts it finds out
    shared_dir: Path
    cache: str  # never, metadata, auto, always
    extra_args: tuple[str, ...] = ()

    def describe(self) -> str:
        return " ".join(render_virtiofsd(self, fd=3))


def parse_implementation(version_text: str) -> VirtiofsdImplementation:
    """Tell the implementations apart by the answer to --version: the C program speaks of FUSE's own version."""
    return (
        VirtiofsdImplementation.C if "FUSE" in version_text or "QEMU" in version_text else VirtiofsdImplementation.RUST
    )


def plan_virtiofsd(
    program: str,
    implementation: VirtiofsdImplementation | None,
    shared_dir: Path,
    *,
    cache: str,
    extra_args: tuple[str, ...],
) -> VirtiofsdPlan:
    return VirtiofsdPlan(program, implementation, shared_dir, cache, extra_args)


def render_virtiofsd(plan: VirtiofsdPlan, *, fd: int) -> list[str]:
    """Return the arguments; `fd` is the listening socket that the daemon inherits.

    It leaves its limit of open files alone, and would end without CAP_SYS_RESOURCE if told to raise it, which a
    container that runs Katapod need not have: its parent sets what it can (host/virtiofsd.py). Locks stay inside the
    guest: it is the only client, and the daemon cannot wait for one (F_SETLKW would fail). The daemon's sandbox is
    `namespace`: it sees the shared directory only.
    """
    if plan.implementation is VirtiofsdImplementation.C:
        # The C program knows three cache modes; `metadata` came with Rust. Its thread pool slows it down
        # at our queue depths, so it is off, as upstream's shipped configuration has it.
        cache = {"never": "none", "metadata": "auto"}.get(plan.cache, plan.cache)
        source = _escape_option(str(plan.shared_dir))
        options = f"source={source},cache={cache},sandbox=namespace,xattr,announce_submounts"
        arguments = ["-f", f"--fd={fd}", "-o", options, "--rlimit-nofile=0", "--thread-pool-size=1"]
    else:
        arguments = [
            f"--fd={fd}",
            f"--shared-dir={plan.shared_dir}",
            f"--cache={plan.cache}",
            "--sandbox=namespace",
            "--xattr",
            "--rlimit-nofile=0",
            "--thread-pool-size=1",
            "--announce-submounts",
        ]
    return [plan.program, *arguments, *plan.extra_args]


def _escape_option(value: str) -> str:
    """libfuse's option parser: a backslash keeps a comma or a backslash."""
    return value.replace("\\", "\\\\").replace(",", "\\,")
