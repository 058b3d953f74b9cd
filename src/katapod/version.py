"""What this installation is: its version and the commit that it was made from. Light: every program shows it."""

import os

from katapod import __version__

__all__ = ["OCI_VERSION", "UNKNOWN", "commit", "version_parts"]

OCI_VERSION = "1.0.2"
"""Of the runtime-spec that specs and states follow."""

UNKNOWN = "unknown"
_HERE = os.path.dirname(os.path.abspath(__file__))


def version_parts() -> tuple[int, int, int]:
    major, minor, patch = (int(part) for part in __version__.split(".")[:3])
    return major, minor, patch


def commit() -> str:
    """The commit as 40 hex digits: of the installation (a file that it brings), else of the checkout."""
    return _read(f"{_HERE}/COMMIT") or _of_checkout(os.path.dirname(os.path.dirname(_HERE))) or UNKNOWN


def _of_checkout(root: str) -> str:
    """git's own files, which are read in a tenth of the time that git takes. Source: gitrepository-layout(5)."""
    git = f"{root}/.git"
    if os.path.isfile(git):  # a worktree
        git = os.path.join(root, _read(git).removeprefix("gitdir: "))
    head = _read(f"{git}/HEAD")
    if not head.startswith("ref: "):
        return head
    name = head.removeprefix("ref: ")
    common = os.path.join(git, _read(f"{git}/commondir") or ".")
    if found := _read(f"{common}/{name}"):
        return found
    for line in _read(f"{common}/packed-refs").splitlines():
        digest, _, ref = line.partition(" ")
        if ref == name:
            return digest
    return ""


def _read(path: str) -> str:
    try:
        with open(path) as handle:
            return handle.read().strip()
    except OSError:
        return ""
