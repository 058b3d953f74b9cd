"""Where archives go: a file that is named, or standard output."""

import contextlib
import sys
from collections.abc import Iterator
from typing import BinaryIO

from katapod.model.errors import UsageError

__all__ = ["opened_output"]


@contextlib.contextmanager
def opened_output(path: str) -> Iterator[BinaryIO]:
    """A new file, or standard output if `path` is empty. Raises UsageError."""
    if not path:
        yield sys.stdout.buffer
        return
    try:
        handle = open(path, "wb")  # noqa: SIM115 - an error of writing is not one of opening
    except OSError as exc:
        raise UsageError(f"cannot write {path}: {exc.strerror}") from exc
    with handle:
        yield handle
