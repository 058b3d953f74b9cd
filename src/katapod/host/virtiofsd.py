"""A running virtiofsd: bound to its socket by us, started, watched, stopped."""

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import AsyncIterator
from pathlib import Path

from katapod.host.limits import forbid_core_dumps, most_open_files
from katapod.host.logs import kept_pipe, read_tail
from katapod.host.process import Child, find_program, spawn, stop_child
from katapod.host.trace import span
from katapod.kernel.confine import forbid_new_privileges
from katapod.kernel.process import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWUTS,
    SECBIT_NO_SETUID_FIXUP,
    add_secure_bits,
    unshare,
)
from katapod.kernel.seccomp import add_filter
from katapod.model.errors import KatapodError
from katapod.plan.call_filter import assemble
from katapod.plan.virtiofsd import VirtiofsdPlan, render_virtiofsd
from katapod.plan.virtiofsd_calls import VIRTIOFSD_CALLS
from katapod.tasks import finish

__all__ = ["VirtiofsdFailed", "VirtiofsdProcess", "running_virtiofsd"]


LOG_BYTES = 64 * 1024
FILTER = assemble(VIRTIOFSD_CALLS) if os.uname().machine == "x86_64" else b""


class VirtiofsdFailed(KatapodError):
    pass


class VirtiofsdProcess:
    def __init__(self, child: Child, log_path: Path) -> None:
        self.child = child
        self.log_path = log_path

    async def wait_end(self) -> str:
        await self.child.process.wait()
        return self.child.describe_end()

    def explain_end(self) -> VirtiofsdFailed:
        said = read_tail(self.log_path, max_lines=5)
        text = f"virtiofsd ended unexpectedly: {self.child.describe_end()}"
        return VirtiofsdFailed(text + (f"; it said: {said}" if said else ""), command=" ".join(self.child.argv))

    async def stop(self) -> None:
        """It ends by itself when the VMM closes the connection; so this is mostly a wait. Idempotent."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await self.child.process.wait()
        await stop_child(self.child, soft=False)


def _confine() -> None:
    """What its own sandbox leaves out; that has namespaces for mounts, processes and the network, and a filter."""
    # It makes files as the guest's user, but does not know that user's groups: without this the host would
    # refuse what a group or an ACL allows. The guest has decided already (FUSE's default_permissions).
    add_secure_bits(SECBIT_NO_SETUID_FIXUP)
    forbid_core_dumps()
    with contextlib.suppress(OSError):  # where that is not allowed its own sandbox says so
        unshare(CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP)
        forbid_new_privileges()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # it holds one for each file that the guest knows
    with contextlib.suppress(OSError):  # as above
        if FILTER:
            add_filter(FILTER)


@contextlib.asynccontextmanager
async def running_virtiofsd(plan: VirtiofsdPlan, socket_path: Path, log_path: Path) -> AsyncIterator[VirtiofsdProcess]:
    """Serve plan.shared_dir on `socket_path`, to which the VMM connects; end it when the block ends.

    The socket is bound here and inherited, so the VMM may connect before the daemon is up.
    """
    program = find_program(plan.program, package="virtiofsd")
    socket_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        socket_path.unlink()
    async with kept_pipe(log_path, LOG_BYTES) as said_to:  # bounded: the guest can provoke its messages
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            try:
                listener.bind(str(socket_path))
            except OSError as exc:
                raise VirtiofsdFailed(f"cannot listen on {socket_path}: {exc.strerror or exc}") from exc
            listener.listen(1)
            argv = render_virtiofsd(plan, fd=listener.fileno())
            child = await spawn(
                [program, *argv[1:]],
                output=said_to.write_end,
                pass_fds=[listener.fileno()],
                before_exec=_confine,
            )
        with contextlib.suppress(ProcessLookupError):  # whoever waits for it sees that it has ended
            most_open_files(child.pid)
        said_to.close()
        daemon = VirtiofsdProcess(child, log_path)
        try:
            yield daemon
        finally:
            with span("stop virtiofsd"):
                await finish(daemon.stop(), name="stop-virtiofsd")
