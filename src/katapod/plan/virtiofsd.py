"""virtiofsd's command line, in both dialects: QEMU's C program (to QEMU 7.2) and the Rust one after it."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

__all__ = ["VirtiofsdDialect", "VirtiofsdPlan", "parse_dialect", "plan_virtiofsd", "render_virtiofsd"]


class VirtiofsdDialect(Enum):
    C = "c"
    RUST = "rust"


@dataclass(frozen=True, slots=True)
class VirtiofsdPlan:
    program: str
    dialect: VirtiofsdDialect
    shared_dir: Path
    cache: str  # never, metadata, auto, always
    extra_args: tuple[str, ...] = ()

    def describe(self) -> str:
        return " ".join(render_virtiofsd(self, fd=3))


def parse_dialect(version_text: str) -> VirtiofsdDialect:
    """Tell the dialects apart by the answer to --version: the C program speaks of FUSE's own version."""
    return VirtiofsdDialect.C if "FUSE" in version_text or "QEMU" in version_text else VirtiofsdDialect.RUST


def plan_virtiofsd(
    program: str, dialect: VirtiofsdDialect, shared_dir: Path, *, cache: str, extra_args: tuple[str, ...]
) -> VirtiofsdPlan:
    return VirtiofsdPlan(program, dialect, shared_dir, cache, extra_args)


def render_virtiofsd(plan: VirtiofsdPlan, *, fd: int) -> list[str]:
    """Return the arguments; `fd` is the listening socket that the daemon inherits.

    File-descriptor limits are left alone: raising them needs CAP_SYS_RESOURCE, which a container that
    runs Katapod need not have. Locks stay inside the guest: it is the only client, and the daemon cannot
    wait for one (F_SETLKW would fail). The daemon's sandbox is `namespace`: it sees the shared directory only.
    """
    if plan.dialect is VirtiofsdDialect.C:
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
