"""Access to a container's root file system, which is not trusted, without being led out of it.

Files must be regular, and reads are bounded. `enter_root` and `find_command` are for a forked child, which takes the
container's root and user; the others resolve paths with openat2(2).
"""

from __future__ import annotations

import errno
import os
import stat

from katapod.kernel.mount import MS_BIND, MS_PRIVATE, MS_REC, mount
from katapod.kernel.openat2 import open_in_root
from katapod.kernel.process import CLONE_NEWNS, unshare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Root", "describe_format", "enter_root", "find_command"]

FILE_MAX = 1024 * 1024  # bytes read of one file
HEAD_MAX = 256  # bytes that tell the format of a program: as many as Linux reads
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)  # what execvp(3) takes for "not found"
ELF_MACHINES = {"x86_64": 62, "aarch64": 183, "riscv64": 243, "ppc64le": 21, "s390x": 22}
ELF_NAMES = {3: "i386", 8: "mips", 20: "ppc", 21: "ppc64", 22: "s390", 40: "arm", 62: "x86_64"} | {
    183: "aarch64", 243: "riscv", 258: "loongarch",
}  # fmt: skip


class Root:
    """A container's root directory; `close` it."""

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        self._fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._fd)

    def read(self, path: str, size_max: int = FILE_MAX, mode: int = 0) -> bytes | None:
        """The beginning of a regular file; None if there is no such file, or it lacks all bits of `mode`."""
        try:
            fd = open_in_root(self._fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            return None
        try:
            found = os.fstat(fd).st_mode
            if not stat.S_ISREG(found) or (mode and not found & mode):
                return None
            data = b""
            while len(data) < size_max:
                more = os.read(fd, size_max - len(data))
                if not more:
                    break
                data += more
            return data
        except OSError:
            return None
        finally:
            os.close(fd)

    def read_text(self, path: str) -> str:
        """Like `read`; empty if there is no such file."""
        return (self.read(path) or b"").decode(errors="surrogateescape")

    def lacks_directory(self, path: str) -> bool:
        """Whether there is nothing at `path`."""
        try:
            os.close(open_in_root(self._fd, path, os.O_PATH))
        except OSError as exc:
            return exc.errno == errno.ENOENT
        return False

    def program_head(self, command: str, path: str, cwd: str) -> bytes | None:
        """The first bytes of the file for `command`, looked up in `path`; None if there is none that may be
        executed."""
        for name in candidates(command, path):
            head = self.read(name if name.startswith("/") else f"{cwd}/{name}", HEAD_MAX, 0o111)
            if head is not None:
                return head
        return None


def candidates(command: str, path: str) -> list[str]:
    """The files that execvp(3) would try."""
    return [command] if "/" in command else [f"{part or '.'}/{command}" for part in path.split(":")]


def describe_format(head: bytes, machine: str) -> str:
    """Why Linux on `machine` (uname -m) cannot execute a file that begins so; empty if it can.

    Linux only says "exec format error", and crun reports it when nothing listens any more. Source: elf(5).
    """
    if head.startswith(b"#!"):
        return ""
    if head[:4] != b"\x7fELF" or len(head) < 20:
        return "it is neither a program nor a script that begins with #!"
    order = "big" if head[5:6] == b"\x02" else "little"
    found = int.from_bytes(head[18:20], order)  # type: ignore[arg-type]
    compatible = {ELF_MACHINES.get(machine, found)} | ({3} if machine == "x86_64" else set())
    if found in compatible:
        return ""
    return f"it is a program for {ELF_NAMES.get(found, f'ELF machine {found}')}, and this machine is {machine}"


def enter_root(root: str, binds: Sequence[tuple[str, str]] = ()) -> None:
    """In a forked child: make `root` the root directory, with (source, destination) mounted in it for
    this process only. Raises OSError."""
    if binds:
        unshare(CLONE_NEWNS)
        mount("none", "/", None, MS_PRIVATE | MS_REC)
        for source, destination in binds:
            try:
                mount(source, root + destination, None, MS_BIND | MS_REC)
            except OSError:
                continue  # made by crun, or wrong: then crun reports it
    os.chroot(root)
    os.chdir("/")


def find_command(command: str, path: str, cwd: str, uid: int, gid: int, groups: list[int]) -> str:
    """In a forked child, after enter_root: what execvp(3) in `cwd` would find: "found", "not in PATH", "missing" (where
    `command` is a path), "denied"; or "no cwd", "cwd is no directory", "cwd denied"."""
    try:
        os.chdir(cwd)
    except FileNotFoundError:
        return "no cwd"
    except NotADirectoryError:
        return "cwd is no directory"
    except PermissionError:
        return "cwd denied"
    except OSError:
        return "found"  # leave the explanation to crun
    os.setgroups(groups)
    os.setgid(gid)
    os.setuid(uid)
    seen = "missing" if "/" in command else "not in PATH"
    if not command:
        return seen
    for name in candidates(command, path):
        try:
            mode = os.stat(name).st_mode
        except PermissionError:
            seen = "denied"
            continue
        except OSError as exc:
            if exc.errno not in MISSING:
                return "found"  # as above: a guest without resources does not mean that the command is missing
            continue
        if stat.S_ISREG(mode) and os.access(name, os.X_OK):
            return "found"
        seen = "denied"
    return seen
