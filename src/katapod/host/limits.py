"""Limits of a child: setrlimit(2), prlimit(2)."""

import contextlib
import resource
from pathlib import Path

__all__ = ["forbid_core_dumps", "most_open_files", "set_limit"]

OPEN_FILES = (
    1_000_000  # of a daemon that has one open for each file that its guest knows: upstream's limit of virtiofsd
)
OPEN_FILES_EVER = Path("/proc/sys/fs/nr_open")


def most_open_files(pid: int) -> None:
    """Let a running child of ours have as many files open as it may: OPEN_FILES with CAP_SYS_RESOURCE, else the hard
    limit that it has. Raises ProcessLookupError."""
    _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < (wanted := min(OPEN_FILES, int(OPEN_FILES_EVER.read_text()))):
        with contextlib.suppress(PermissionError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (wanted, wanted))
            return
    with contextlib.suppress(PermissionError):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))


def set_limit(kind: int, value: int) -> None:
    """Soft and hard, of RLIMIT_...; not above the hard one that there is, which needs CAP_SYS_RESOURCE."""
    _, most = resource.getrlimit(kind)
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(kind, (value, value))


def forbid_core_dumps() -> None:
    """Neither to a file, which one byte is too short for, nor to the program that core(5)'s pattern names: that one is
    asked with a limit of 0, too, and runs as root."""
    set_limit(resource.RLIMIT_CORE, 1)
