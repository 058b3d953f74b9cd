"""The one door to a node: its files below a root directory, and its programs.

On the node itself the root is /. In a job it is where the node's / is mounted; programs are then run in the mount
namespace of the node's engine, which the job sees since it shares the node's processes. A chroot would not do: within
one nobody may make a user namespace. Source: user_namespaces(7), EPERM of unshare(2).
"""

import contextlib
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from katapod.operator.node.errors import NodeError

__all__ = ["Host"]

log = logging.getLogger(__name__)

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SAID = 2000  # characters of a failed program's output


class Host:
    def __init__(self, root: Path) -> None:
        self.root = root
        self._mount_namespace: int | None = None  # a descriptor: it stays when the engine is started anew

    def join(self, pid: int) -> None:
        """Run programs where process `pid` of the node's is, unless that is here or was said already."""
        if self.root != Path("/") and self._mount_namespace is None:
            self._mount_namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)

    def path(self, inside: str | Path) -> Path:
        """Where a path of the node's is for us."""
        return self.root / str(inside).lstrip("/")

    def read(self, inside: str | Path) -> str | None:
        """None if there is no such file."""
        try:
            return self.path(inside).read_text()
        except FileNotFoundError:
            return None

    def write(self, inside: str | Path, text: str | None) -> None:
        """Replace a file at once, with its owner and mode; None removes it."""
        target = self.path(inside)
        if text is None:
            target.unlink(missing_ok=True)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        half = target.with_name(f".{target.name}.katapod")
        try:
            with half.open("w") as file:
                file.write(text)
                with contextlib.suppress(FileNotFoundError):
                    before = target.stat()
                    os.fchmod(file.fileno(), before.st_mode & 0o7777)
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
                file.flush()
                os.fsync(file.fileno())
            half.replace(target)
        finally:
            half.unlink(missing_ok=True)

    def remove(self, inside: str | Path, *, itself: bool = True) -> None:
        """All that is in a directory, and the directory, if there is one. Raises NodeError."""
        target = self.path(inside)
        try:
            for entry in target.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            if itself:
                target.rmdir()
        except FileNotFoundError:
            return
        except OSError as exc:
            raise NodeError(f"cannot remove {inside}: {exc.strerror}: {exc.filename}") from exc

    def run(self, *argv: str, limit_s: float = 120, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run one of the node's programs to its end. Raises NodeError with what it said, unless `check` is off."""
        command: Sequence[str] = argv
        namespace = self._mount_namespace
        if namespace is not None:
            command = ["nsenter", f"--mount=/proc/self/fd/{namespace}", "--", *argv]
        log.debug("run %s", argv)
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=limit_s,
                env={"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8"},
                cwd="/",
                pass_fds=() if namespace is None else (namespace,),
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            raise NodeError(f"{' '.join(argv)} did not end within {limit_s:g} s") from exc
        except OSError as exc:
            raise NodeError(f"cannot run {argv[0]}: {exc.strerror}") from exc
        if check and done.returncode:
            said = (done.stderr.strip() or done.stdout.strip())[-SAID:]
            raise NodeError(f"{' '.join(argv)} ended with {done.returncode}: {said}")
        return done

    def wait(self, found: Callable[[], bool], what: str, limit_s: float) -> None:
        """Until it is so. Raises NodeError after the limit."""
        end = time.monotonic() + limit_s
        while not found():
            if time.monotonic() > end:
                raise NodeError(f"{what}: not within {limit_s:g} s")
            time.sleep(0.2)
