"""Running programs, and forked children: the only place that starts processes.

Children get default signal dispositions (Python ignores SIGPIPE, which a container would inherit), a small environment,
and only the given descriptors.
"""

from __future__ import annotations

import os
import signal

from katapod.agent.loop import Cancelled, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ENVIRONMENT", "ProgramError", "find_program", "Running", "fix_addresses", "in_child", "run", "start"]

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/", "LANG": "C.UTF-8"}
OUTPUT_MAX = 64 * 1024
TAIL_MAX = 4096
_fixed = False


class ProgramError(Exception):
    """A program could not be started, timed out or failed. `tail` is the end of its output."""

    def __init__(self, what: str, tail: str = "") -> None:
        super().__init__(f"{what}: {tail}" if tail else what)
        self.tail = tail


def fix_addresses() -> None:
    """Have the kernel put each program that is run from now on, with its libraries, where it was before.

    Under emulation all that a program executes is translated again when it lies elsewhere: half of the time that crun
    takes, and 3 MiB of translated code each time (docs/adr/0056-crun-of-an-exec.md). What crun starts is not ours: its
    spec has a personality.
    """
    global _fixed
    _fixed = True


def find_program(name: str) -> str:
    """Raises ProgramError."""
    for directory in ENVIRONMENT["PATH"].split(":"):
        if os.access(f"{directory}/{name}", os.X_OK):
            return f"{directory}/{name}"
    raise ProgramError(f"cannot run {name}: the guest image has no such program")


class Running:
    """A program that has been started; `finish` waits for it."""

    def __init__(self, loop: Loop, name: str, pid: int, output: int) -> None:
        self._loop = loop
        self.name = name
        self.pid = pid
        self.output = output  # descriptor of its output and errors; -1: it has streams of its caller
        self.exit_status = loop.child_exit(pid)

    def kill(self) -> None:
        if not self.exit_status.done:
            os.kill(self.pid, signal.SIGKILL)

    async def finish(self, limit_s: float) -> str:
        """As `run`."""
        try:
            if not await self._loop.wait_any([self.exit_status], limit_s):
                self.kill()
                await self.exit_status
                raise ProgramError(f"{self.name} timed out after {limit_s:g} s")
            text = _read_available(self.output) if self.output >= 0 else ""
        except Cancelled:
            self.kill()
            raise
        finally:
            if self.output >= 0:
                self._loop.close_fd(self.output)
        code = os.waitstatus_to_exitcode(self.exit_status.result())
        if code:
            raise ProgramError(f"{self.name} exited with {code}", text[-TAIL_MAX:].strip())
        return text


async def run(
    loop: Loop,
    arguments: list[str],
    limit_s: float,
    stdio: tuple[int, int, int] | None = None,
    path: str = "",
) -> str:
    """Run a program (at `path`, else found by its name) to its end and return the first 64 KiB of its output and
    errors, unless `stdio` is given as its descriptors 0 to 2, which the caller still owns.

    Raises ProgramError, also if it does not exit with 0.
    """
    return await start(loop, arguments, stdio, path).finish(limit_s)


def start(
    loop: Loop,
    arguments: list[str],
    stdio: tuple[int, int, int] | None = None,
    path: str = "",
    more_fds: tuple[int, ...] = (),
) -> Running:
    """Start a program, as `run`; it has `more_fds` by their numbers. Raises ProgramError."""
    path = path or find_program(arguments[0])
    output = -1
    if stdio is None:
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        output, write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(output, False)
        fds = (null, write_end, write_end)
    else:
        fds = stdio
    actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds)]
    actions += [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in more_fds]  # stays open: posix_spawn_file_actions_adddup2(3)
    try:
        return Running(loop, " ".join(arguments[:2]), _spawn(path, arguments, actions), output)
    except OSError as exc:
        if output >= 0:
            os.close(output)
        raise ProgramError(f"cannot run {arguments[0]}: {exc.strerror}") from exc
    finally:
        if stdio is None:
            os.close(null)
            os.close(write_end)


def _spawn(path: str, arguments: list[str], actions: list[tuple[int, int, int]]) -> int:
    """Start the program; returns its process. Raises OSError."""
    if _fixed:
        from katapod.kernel.process import ADDR_NO_RANDOMIZE, set_personality

        former = set_personality(ADDR_NO_RANDOMIZE)
    try:
        return os.posix_spawn(
            path,
            arguments,
            ENVIRONMENT,
            file_actions=actions,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD],
            setsigmask=[],
        )
    finally:
        if _fixed:
            set_personality(former)


def _read_available(fd: int) -> str:
    """The output in the pipe of a program that has ended. One with more output blocks, until its timeout."""
    try:
        return os.read(fd, OUTPUT_MAX).decode(errors="replace")
    except BlockingIOError:
        return ""


async def in_child(loop: Loop, action: Callable[[], str], limit_s: float) -> str:
    """Fork, run `action` in the child (which may change root, user, namespaces) and return its text.

    The child must not import anything that is not loaded. Raises ProgramError with the text of an
    OSError or ValueError of the action.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _child(action, write_end)
    exit_status = loop.child_exit(pid)
    os.close(write_end)
    os.set_blocking(read_end, False)
    try:
        if not await loop.wait_any([exit_status], limit_s):
            raise ProgramError(f"a step in the container's root took longer than {limit_s:g} s")
        text = _read_available(read_end)
    finally:
        if not exit_status.done:
            os.kill(pid, signal.SIGKILL)
        loop.close_fd(read_end)
    if exit_status.result():
        raise ProgramError(text or f"a child ended with wait status {exit_status.result()}")
    return text


def _child(action: Callable[[], str], write_end: int) -> None:
    """Never returns."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        text = action()
        code = 0
    except (OSError, ValueError, LookupError) as exc:
        text = str(exc)
    except BaseException as exc:
        text = repr(exc)
    try:
        os.write(write_end, text.encode(errors="replace")[:OUTPUT_MAX])
    finally:
        os._exit(code)
