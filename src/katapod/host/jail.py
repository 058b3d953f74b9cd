"""A program in a jail: started, watched and ended by this process, which is its parent. See plan/jail.py.

It is forked here, without the help of another program: of those that are common, none does all of this (ADR 43).
"""

import asyncio
import contextlib
import functools
import logging
import os
import shlex
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

from msgspec import Struct

from katapod.host.jail_entry import Entry, enter_jail
from katapod.host.process import CannotRun, Child, open_netns, stop_child
from katapod.kernel.process import CLONE_NEWPID, setns, unshare
from katapod.model.errors import HostLacks
from katapod.plan.call_filter import assemble
from katapod.plan.jail import JailPlan
from katapod.tasks import finish

__all__ = ["Program", "running_in_jail", "start_in_jail"]

log = logging.getLogger(__name__)


class Program(Struct, frozen=True):
    """What is executed in a jail: `path` is a path there. It has this environment and no other."""

    path: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]


@contextlib.asynccontextmanager
async def running_in_jail(
    plan: JailPlan, program: Program, *, output: int, pass_fds: Sequence[int] = (), soft: bool = True
) -> AsyncIterator[Child]:
    """As start_in_jail; at the end SIGTERM if `soft`, a wait, SIGKILL, which ends all that it has started, too."""
    child = start_in_jail(plan, program, output=output, pass_fds=pass_fds)
    try:
        yield child
    finally:
        await finish(stop_child(child, soft=soft))


def start_in_jail(plan: JailPlan, program: Program, *, output: int, pass_fds: Sequence[int] = ()) -> Child:
    """Start a program that lives beside us and gets SIGKILL when this process dies, however that happens. Called in the
    main thread, where an event loop runs; it blocks until the program is executed, for milliseconds.

    It inherits `pass_fds` under their own numbers; its streams are /dev/null and `output`. The caller ends it by
    stop_child. Raises HostLacks if the jail cannot be made, CannotRun if the program cannot be executed in it.
    """
    log.debug("jail for %s:\n%s", shlex.join(program.argv), plan.describe())
    with contextlib.ExitStack() as stack:
        netns = open_netns(program.argv, plan.netns)
        if netns is not None:
            stack.callback(os.close, netns)
        parent = os.pidfd_open(os.getpid())
        stack.callback(os.close, parent)
        report, reported = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        stack.callback(os.close, report)
        stack.callback(os.close, reported)
        filtered = assemble(plan.calls) if plan.calls is not None else b""
        entry = Entry(plan, filtered, netns, tuple(pass_fds), parent, reported)
        stack.enter_context(_next_child_is_process_1())
        try:
            process = subprocess.Popen(
                program.argv,
                executable=program.path,
                env=dict(program.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                close_fds=False,  # enter_jail has done it: the filter may not allow what this would do
                start_new_session=True,
                preexec_fn=functools.partial(enter_jail, entry),
            )
        except subprocess.SubprocessError as exc:  # of enter_jail
            raise _cannot(plan, program, os.read(report, 4096)) from exc
        except OSError as exc:
            raise CannotRun(f"cannot run {program.path} in its jail: {exc.strerror}") from exc
    return Child(program.argv, _Process(process))


@contextlib.contextmanager
def _next_child_is_process_1() -> Iterator[None]:
    """What this thread forks meanwhile is in a new PID namespace. It cannot start threads then (clone(2))."""
    own = os.open("/proc/thread-self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        unshare(CLONE_NEWPID)
        try:
            yield
        finally:
            setns(own, CLONE_NEWPID)
    except OSError as exc:
        raise HostLacks(
            f"cannot make a PID namespace: {exc.strerror}", hint="Katapod needs CAP_SYS_ADMIN on this host"
        ) from exc
    finally:
        os.close(own)


def _cannot(plan: JailPlan, program: Program, report: bytes) -> HostLacks:
    if not report:
        return HostLacks(f"cannot make a jail for {program.argv[0]}: it ended before that was done")
    step, number, path = report.decode(errors="replace").split("\0", 2)
    cause = os.strerror(int(number)) + (f": {path}" if path else "")
    hint = "Katapod needs the capabilities of root on this host, CAP_SYS_ADMIN among them"
    if step == "change its user":
        hint = f"user id {plan.uid} has to exist in the user namespace of this process: see /proc/self/uid_map"
    return HostLacks(f"cannot make a jail for {program.argv[0]}: cannot {step}: {cause}", hint=hint)


class _Process:
    """A RunningProcess that was not started by asyncio: its end is read from a pidfd."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.pid = process.pid
        self._process = process
        self._pidfd = os.pidfd_open(process.pid)
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._reap)

    @property
    def returncode(self) -> int | None:
        return self._ended.result() if self._ended.done() else None

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._ended.set_result(self._process.wait())
