"""crun in the guest: running it, and parsing its errors."""

from __future__ import annotations

import errno
import fcntl
import json
import os

from katapod.agent import program, trace
from katapod.agent.loop import Loop
from katapod.kernel.trees import remove_tree

__all__ = ["Call", "forget", "release", "run", "sealed_binary", "start"]

ROOT = "/run/crun"
LOG_DIRECTORY = "/run/kata-containers"
LIMIT_S = 60.0
ERROR_MAX = 4096
_count = 0
_sealed_fd = -1


def sealed_binary() -> str:
    """The path of a sealed copy of crun in memory.

    To keep a container from overwriting crun through /proc/PID/exe, crun re-executes itself from a read-only mount,
    unless it already runs from a sealed file. That would take 0.06 s each time under emulation.
    """
    global _sealed_fd
    if _sealed_fd < 0:
        fd = os.memfd_create("crun", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with open(program.find_program("crun"), "rb") as source:
            while True:
                data = source.read(1 << 20)
                if not data:
                    break
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        _sealed_fd = fd
    return f"/proc/self/fd/{_sealed_fd}"


def _last_error(path: str) -> str:
    """The message of the last line of a JSON log."""
    try:
        with open(path, "rb") as handle:
            handle.seek(max(0, os.fstat(handle.fileno()).st_size - 4 * ERROR_MAX))
            lines = handle.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("msg"):
            return str(entry["msg"])[:ERROR_MAX]
    return ""


class Call:
    """crun, which has been started."""

    def __init__(self, verb: str, running: program.Running, log_path: str) -> None:
        self.program = running
        self._verb = verb
        self._log_path = log_path

    async def finish(self) -> None:
        """Wait until it has ended. Raises ProgramError with crun's last error as `tail`."""
        try:
            with trace.Span(f"crun {self._verb}"):
                await self.program.finish(LIMIT_S)
        except program.ProgramError as exc:
            raise program.ProgramError(f"crun {self._verb} failed", _last_error(self._log_path) or str(exc)) from exc
        finally:
            self.forget()

    def forget(self) -> None:
        """Remove its log. Raises OSError."""
        if os.path.exists(self._log_path):
            os.unlink(self._log_path)


def start(
    loop: Loop,
    arguments: list[str],
    stdio: tuple[int, int, int] | None = None,
    more_fds: tuple[int, ...] = (),
    nice: int = 0,
) -> Call:
    """Start crun with `arguments`; `stdio` are descriptors 0 to 2 for the container, which the caller still owns, as it
    does `more_fds`, which crun has by their numbers. `nice` is its priority. Raises ProgramError."""
    global _count
    _count += 1
    log_path = f"{LOG_DIRECTORY}/crun-{_count}.log"
    command = ["crun", "--root", ROOT, "--cgroup-manager=cgroupfs", "--log", log_path, "--log-format=json"]
    running = program.start(loop, command + arguments, stdio, sealed_binary(), more_fds)
    if nice:
        os.setpriority(os.PRIO_PROCESS, running.pid, nice)  # it has started nothing yet; not waited for, it is there
    return Call(arguments[0], running, log_path)


async def run(loop: Loop, arguments: list[str], stdio: tuple[int, int, int] | None = None, nice: int = 0) -> None:
    """Run crun, as `start`, to its end. Raises ProgramError with crun's last error as `tail`."""
    await start(loop, arguments, stdio, nice=nice).finish()


def release(container_id: str) -> bool:
    """Start a created container like `crun start`: write to the FIFO on which it waits, and remove that, which marks
    the container as running for crun. False if there is no FIFO. Raises OSError.

    Running crun for this would take 0.1 s under emulation.
    """
    path = f"{ROOT}/{container_id}/exec.fifo"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENXIO):  # another version of crun, or its child has died
            return False
        raise
    try:
        os.unlink(path)
        os.write(fd, b"\0")
    finally:
        os.close(fd)
    return True


def forget(container_id: str) -> None:
    """Remove crun's state of a container whose processes are dead. Raises OSError."""
    directory = f"{ROOT}/{container_id}"
    if os.path.isdir(directory):
        remove_tree(directory)
