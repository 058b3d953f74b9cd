"""A process in the guest outside of containers: a shell or command of the debug console."""

from __future__ import annotations

import errno
import os
import signal
import struct

from katapod.agent.loop import Loop
from katapod.agent.paths import SANDBOX_NS
from katapod.agent.process import Process, Stdio, open_streams
from katapod.agent.program import ENVIRONMENT
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["shell_command", "start_process"]

SHELLS = (("/bin/bash", "bash"), ("/bin/sh", "sh"), ("/bin/busybox", "sh"))
PROMPT = "[vm] \\w \\$ "  # distinct from a container's prompt
DEFAULTS = {"HOME": "/root", "TERM": "vt100", "USER": "root", "PS1": PROMPT}
DEFAULT_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD)


def shell_command() -> tuple[str, str]:
    """(path, name) of the guest's shell. Raises RpcError (UNAVAILABLE)."""
    for path, name in SHELLS:
        if os.access(path, os.X_OK):
            return path, name
    raise RpcError(StatusCode.UNAVAILABLE, "the guest image has no shell")


def start_process(
    loop: Loop,
    exec_id: str,
    arguments: list[str],
    env: Iterable[str],
    cwd: str,
    *,
    terminal: bool,
    size: tuple[int, int] | None = None,
) -> Process:
    """Start `arguments`, or a shell if there are none, in its own session and in the sandbox's namespaces.

    `size`: rows and columns of its terminal, set before it starts.
    Raises RpcError: NOT_FOUND or PERMISSION_DENIED about the command, else INTERNAL; OSError.
    """
    environment = ENVIRONMENT | DEFAULTS | dict(entry.partition("=")[::2] for entry in env)
    if arguments:
        paths = _candidates(arguments[0], environment.get("PATH", ""))
    else:
        path, name = shell_command()
        paths, arguments = [path], [name]
    if terminal:
        master, slave = os.openpty()
        stdio, theirs = Stdio(loop, master, master, -1, terminal=True), (slave, slave, slave)
        if size is not None:
            stdio.resize(*size)
    else:
        stdio, theirs = open_streams(loop, 0)
    report, report_write = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
        if pid == 0:
            _become(paths, arguments, environment, cwd or "/", theirs, report_write, terminal=terminal)
        ended = loop.child_exit(pid)
        os.close(report_write)
        report_write = -1
        failure = os.read(report, 8)  # the child's exec closes it
    except BaseException:
        stdio.close()
        raise
    finally:
        for fd in {*theirs, report, report_write} - {-1}:
            os.close(fd)
    if failure:
        stdio.close()
        _explain(arguments[0], cwd, *struct.unpack("ii", failure))
    return Process(exec_id, pid, stdio, ended)


def _candidates(name: str, path: str) -> list[str]:
    return [name] if "/" in name else [f"{directory}/{name}" for directory in path.split(":") if directory]


def _explain(name: str, cwd: str, number: int, in_cwd: int) -> None:
    if in_cwd:
        raise RpcError(StatusCode.INVALID_ARGUMENT, f"cannot use the working directory {cwd}: {os.strerror(number)}")
    text = f'cannot run "{name[:200]}" in the VM: {os.strerror(number)}'
    codes = {
        errno.ENOENT: StatusCode.NOT_FOUND,
        errno.ENOTDIR: StatusCode.NOT_FOUND,
        errno.EACCES: StatusCode.PERMISSION_DENIED,
        errno.ENOEXEC: StatusCode.PERMISSION_DENIED,
    }
    raise RpcError(codes.get(number, StatusCode.INTERNAL), text)


def _become(
    paths: list[str],
    arguments: list[str],
    environment: dict[str, str],
    cwd: str,
    fds: tuple[int, int, int],
    report: int,
    *,
    terminal: bool,
) -> None:
    """Runs in the child; never returns. `report` receives errno, and whether the working directory caused it."""
    number, in_cwd = errno.EINVAL, 0
    try:
        signal.set_wakeup_fd(-1)
        for one in DEFAULT_SIGNALS:
            signal.signal(one, signal.SIG_DFL)
        os.setsid()
        if terminal:
            import fcntl
            import termios

            fcntl.ioctl(fds[0], termios.TIOCSCTTY, 0)
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
        _leave_our_score()
        _join_sandbox()
        in_cwd = 1
        os.chdir(cwd)
        in_cwd, number = 0, errno.ENOENT
        for path in paths:
            try:
                os.execve(path, arguments, environment)  # noqa: S606 - no shell but the asked one
            except OSError as exc:
                if exc.errno not in (errno.ENOENT, errno.ENOTDIR):
                    number = exc.errno or number
    except OSError as exc:
        number = exc.errno or number
    finally:
        os.write(report, struct.pack("ii", number, in_cwd))
        os._exit(127)


def _leave_our_score() -> None:
    """Undo the agent's OOM protection for what runs here."""
    try:
        with open("/proc/self/oom_score_adj", "w") as handle:
            handle.write("0")
    except OSError:
        return


def _join_sandbox() -> None:
    """Host name and IPC are those of the sandbox, once it exists."""
    from katapod.kernel.process import CLONE_NEWIPC, CLONE_NEWUTS, setns

    for kind, flag in (("uts", CLONE_NEWUTS), ("ipc", CLONE_NEWIPC)):
        try:
            fd = os.open(f"{SANDBOX_NS}/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            setns(fd, flag)
        finally:
            os.close(fd)
