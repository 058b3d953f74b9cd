"""Guest memory as anonymous files (memfd): made, copied to and from a template's file.

A memfd is shared with virtiofsd, as virtio-fs needs, and is gone with the last process that holds it: nothing
is left on disk whoever dies. Copies are sparse: holes stay holes, and pages of zeros become holes.
"""

import errno
import os

from katapod.kernel.punch import punch_hole
from katapod.model.errors import KatapodError, NoSpace

__all__ = ["copy_memory", "free_memory", "new_memory", "save_memory"]

PAGE_BYTES = 4096
RUN_BYTES = 1 << 20  # looked through for pages of zeros at a time
_ZEROS = bytes(RUN_BYTES)


def new_memory(size_mib: int) -> int:
    """Return the descriptor of a memfd of `size_mib`, all of it a hole. The caller's to close."""
    fd = os.memfd_create("katapod-guest-memory", os.MFD_CLOEXEC)
    os.ftruncate(fd, size_mib << 20)
    return fd


def copy_memory(source: int, target: int) -> int:
    """Copy what `source` holds into `target`, a memfd of its size; returns the bytes copied.

    The kernel copies from page cache to page cache (sendfile); the template itself is never mapped or written.
    Raises NoSpace, KatapodError.
    """
    copied = 0
    for start, end in _data_ranges(source):
        os.lseek(target, start, os.SEEK_SET)
        offset = start
        while offset < end:
            try:
                count = os.sendfile(target, source, offset, end - offset)
            except OSError as exc:
                raise _explain(exc, "copy the template's memory") from exc
            if count == 0:
                raise KatapodError("cannot copy the template's memory: its file has become shorter")
            offset += count
        copied += end - start
    return copied


def free_memory(fd: int, offset: int, length: int) -> None:
    """Give a range of guest memory back to the host, in bytes; the guest finds zeros there. Raises KatapodError."""
    try:
        punch_hole(fd, offset, length)
    except OSError as exc:
        raise _explain(exc, f"free {length} bytes of guest memory at {offset:#x}") from exc


def save_memory(source: int, target: int, size_mib: int) -> int:
    """Copy a stopped guest's memory into the empty file `target`, leaving out pages of zeros; returns the bytes
    written. Raises NoSpace, KatapodError."""
    written = 0
    try:
        os.ftruncate(target, size_mib << 20)
        for start, end in _data_ranges(source):
            for offset in range(start, end, RUN_BYTES):
                run = memoryview(os.pread(source, min(RUN_BYTES, end - offset), offset))
                written += _save_run(run, target, offset)
    except OSError as exc:
        raise _explain(exc, "save the template's memory") from exc
    return written


def _save_run(run: memoryview, target: int, offset: int) -> int:
    if run == _ZEROS[: len(run)]:
        return 0
    written = 0
    begin = -1  # of a stretch of pages that are not zero
    for position in range(0, len(run) + PAGE_BYTES, PAGE_BYTES):
        page = run[position : position + PAGE_BYTES]
        if page and page != _ZEROS[: len(page)]:
            begin = position if begin < 0 else begin
        elif begin >= 0:
            stretch = run[begin:position]
            while stretch:
                count = os.pwrite(target, stretch, offset + begin)
                stretch, begin, written = stretch[count:], begin + count, written + count
            begin = -1
    return written


def _data_ranges(fd: int) -> list[tuple[int, int]]:
    """(start, end) of all that is no hole."""
    found: list[tuple[int, int]] = []
    offset = 0
    while True:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # nothing but a hole follows
                return found
            raise
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, offset))


def _explain(exc: OSError, what: str) -> KatapodError:
    kind = NoSpace if exc.errno in (errno.ENOSPC, errno.ENOMEM) else KatapodError
    return kind(f"cannot {what}: {exc.strerror}")
