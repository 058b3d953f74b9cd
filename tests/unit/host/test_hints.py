"""Advice fits the cause of an error."""

import errno
import os

import pytest

from katapod.cli.settings import print_error
from katapod.host.hints import hint_for


@pytest.mark.parametrize(
    ("number", "user", "hint"),
    [
        (errno.ENOSPC, 0, "free some space on that file system"),
        (errno.EDQUOT, 0, "free some space on that file system"),
        (errno.EROFS, 0, "that file system is mounted read-only"),
        (errno.EACCES, 1000, "this needs root: run it with sudo"),
        (errno.EACCES, 0, ""),  # he is root already
        (errno.EIO, 1000, ""),
    ],
)
def test_hints(monkeypatch: pytest.MonkeyPatch, number: int, user: int, hint: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert hint_for(OSError(number, os.strerror(number))) == hint


def test_an_error_of_the_kernel_is_told_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    print_error(PermissionError(errno.EACCES, "Permission denied", "/run/vc/sbs"))
    print_error(OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"))
    print_error(OSError("no number"))
    assert capsys.readouterr().err == (
        "kata-runtime: /run/vc/sbs: Permission denied\n  hint: this needs root: run it with sudo\n"
        "kata-runtime: /a -> /b: Invalid cross-device link\nkata-runtime: no number\n"
    )
