"""What has become other between two trees of files."""

import stat

import pytest

from katapod.model.file_changes import FileEntry, file_changes

DIRECTORY = FileEntry(stat.S_IFDIR, 0o755, 0, 0)
FILE = FileEntry(stat.S_IFREG, 0o644, 0, 0, 5, 100)
TREE = {"etc": DIRECTORY, "etc/a": FILE, "var": DIRECTORY, "var/lib": DIRECTORY, "var/lib/b": FILE, "b": FILE}


def told(after: dict[str, FileEntry], *left_out: str) -> list[str]:
    return [f"{each.kind} {each.path}" for each in file_changes(TREE, after, left_out)]


def without(*paths: str) -> dict[str, FileEntry]:
    return {path: entry for path, entry in TREE.items() if path not in paths}


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (TREE, []),
        ({**TREE, "etc/new": FILE}, ["C etc", "A etc/new"]),
        ({**TREE, "new": DIRECTORY, "new/sub": DIRECTORY, "new/sub/x": FILE}, ["A new", "A new/sub", "A new/sub/x"]),
        (without("var/lib/b"), ["C var", "C var/lib", "D var/lib/b"]),
        (without("var", "var/lib", "var/lib/b"), ["D var"]),
        ({**TREE, "b": FileEntry(stat.S_IFREG, 0o644, 0, 0, 6, 100)}, ["C b"]),
        ({**TREE, "b": FileEntry(stat.S_IFREG, 0o644, 0, 0, 5, 101)}, ["C b"]),
        ({**TREE, "b": FileEntry(stat.S_IFREG, 0o600, 0, 0, 5, 100)}, ["C b"]),
        ({**TREE, "b": FileEntry(stat.S_IFLNK, 0, 0, 0, target="etc/a")}, ["C b"]),
        ({**TREE, "etc": FileEntry(stat.S_IFDIR, 0o700, 0, 0)}, ["C etc"]),
        ({**without("etc", "etc/a"), "etc": FILE}, ["C etc", "D etc/a"]),
    ],
)
def test_changes(after: dict[str, FileEntry], expected: list[str]) -> None:
    assert told(after) == expected


def test_what_is_mounted_is_left_out() -> None:
    after = {**without("etc/a"), "proc": DIRECTORY, "proc/1": DIRECTORY, "processes": FILE}
    assert told(after, "proc", "etc/a") == ["A processes"]
