"""Removal and traversal of file trees whose content is not trusted.

Paths are single names, symbolic links are not followed, and mount points are not entered. A tree may have any depth:
nothing here recurses, and the number of open descriptors is constant.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
import time

from katapod.kernel.openat2 import open_child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["remove_tree", "walk_tree"]

FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602  # linux/fs.h, of 64-bit machines
FS_IMMUTABLE_FL, FS_APPEND_FL = 0x10, 0x20
IDLE_ROUNDS = 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: str, *, deadline: float | None = None) -> None:
    """Remove `path` and everything below it. Idempotent; others may remove or change the tree meanwhile.

    Removes as much as possible; then raises OSError for the first entry that could not be removed, with its name.
    Raises TimeoutError once time.monotonic() has passed `deadline`; the next call continues from there.
    """
    try:
        top = os.open(path, _DIRECTORY)
    except FileNotFoundError:
        return
    except OSError as exc:
        if exc.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        try:
            directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except NotADirectoryError:
            return  # there is nothing below what is not a directory
        try:
            _insist(lambda: os.unlink(path), directory, os.path.basename(path))
        finally:
            os.close(directory)
        return
    try:
        _Removal(top, deadline).run()
    finally:
        os.close(top)
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return


class _Removal:
    """Empties the directory `top`. Directories found two levels down are moved up into `top`, so that the tree becomes
    flat and is never visited deeper than two levels."""

    def __init__(self, top: int, deadline: float | None) -> None:
        self._top = top
        self._deadline = deadline
        token = os.urandom(8).hex()
        self._names = (f".{token}.{number}" for number in itertools.count())
        self._changed = False
        self._problem: OSError | None = None

    def run(self) -> None:
        """Raises OSError."""
        idle = 0
        while idle < IDLE_ROUNDS:  # what is moved to `top` may be seen in this pass or in the next
            self._changed, self._problem, empty = False, None, True
            with os.scandir(self._top) as entries:
                for entry in entries:
                    empty = False
                    self._remove(self._top, entry, self._flatten)
            if empty:
                return
            if not self._changed and self._problem is not None:
                raise self._problem
            idle = 0 if self._changed else idle + 1
        raise OSError(errno.ENOTEMPTY, "an entry that is listed in it cannot be found")

    def _remove(self, directory: int, entry: os.DirEntry[str], if_filled: Callable[[int, str], None]) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise TimeoutError(errno.ETIME, "it takes longer than the given time to remove", entry.name)
        try:
            if not entry.is_dir(follow_symlinks=False):
                _insist(lambda: os.unlink(entry.name, dir_fd=directory), directory, entry.name)
            else:
                try:
                    _insist(lambda: os.rmdir(entry.name, dir_fd=directory), directory, entry.name)
                except OSError as exc:
                    if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    if_filled(directory, entry.name)
                    return
            self._changed = True
        except FileNotFoundError:
            pass  # another process is removing it too
        except OSError as exc:
            self._note(exc, entry.name)

    def _flatten(self, directory: int, name: str) -> None:
        """Raises OSError."""
        child = open_child(directory, name)
        try:
            with os.scandir(child) as entries:
                for entry in entries:
                    self._remove(child, entry, self._move_up)
        finally:
            os.close(child)
        try:
            os.rmdir(name, dir_fd=directory)
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # the reason is known, or there is another pass
                raise

    def _move_up(self, directory: int, name: str) -> None:
        """Raises OSError: on a mount point, or where even the top has no room for a name."""
        new = next(self._names)
        _insist(lambda: os.rename(name, new, src_dir_fd=directory, dst_dir_fd=self._top), directory, name)
        self._changed = True

    def _note(self, problem: OSError, name: str) -> None:
        if self._problem is None:
            self._problem = OSError(problem.errno, problem.strerror, name)


def _insist(action: Callable[[], None], directory: int, name: str) -> None:
    """Try `action`; if it is not permitted, clear the inode flags that may cause this and try again. Raises OSError."""
    try:
        action()
    except PermissionError:
        flags_gone = [_clear_flags(directory), _clear_flags_of(directory, name)]
        if not any(flags_gone):
            raise
        action()


def _clear_flags_of(directory: int, name: str) -> bool:
    """Only files and directories are opened: opening a device or a FIFO may have effects."""
    try:
        found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return False
    try:
        mode = os.fstat(found).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            return False
        opened = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    finally:
        os.close(found)
    try:
        return _clear_flags(opened)
    finally:
        os.close(opened)


def _clear_flags(fd: int) -> bool:
    """Whether it was immutable or append-only, and is no longer. Source: ioctl_iflags(2)."""
    try:
        flags = int.from_bytes(fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8))[:4], "little")
        if not flags & (FS_IMMUTABLE_FL | FS_APPEND_FL):
            return False
        flags &= ~(FS_IMMUTABLE_FL | FS_APPEND_FL)
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, flags.to_bytes(8, "little"))
    except OSError:
        return False
    return True


def walk_tree(path: str) -> Iterator[tuple[int, str]]:
    """Everything below the directory `path`, as (descriptor of the parent, name): children before their parent.

    The descriptor is valid until the next step. Entries that appear meanwhile may be missed; the caller may remove what
    it visits. Memory grows with the names of unvisited siblings along the path. Raises OSError, also when a directory
    on the path is moved meanwhile.
    """
    here = os.open(path, _DIRECTORY)
    way: list[tuple[str, list[str], tuple[int, int]]] = []  # name, unvisited siblings, identity of the parent
    try:
        pending = _directories(here)
        while True:
            if pending:
                name = pending.pop()
                way.append((name, pending, _identity(here)))
                here = _replaced(here, open_child(here, name))
                pending = _directories(here)
                continue
            with os.scandir(here) as entries:
                for entry in entries:
                    if not entry.is_dir(follow_symlinks=False):
                        yield here, entry.name
            if not way:
                return
            name, pending, parent = way.pop()
            here = _replaced(here, os.open("..", _DIRECTORY, dir_fd=here))
            if _identity(here) != parent:
                raise OSError(errno.ESTALE, "the directory was moved while it was traversed", name)
            yield here, name
    finally:
        os.close(here)


def _replaced(old: int, new: int) -> int:
    os.close(old)
    return new


def _directories(fd: int) -> list[str]:
    with os.scandir(fd) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino
