"""A running qemu-storage-daemon, in a jail: carries out a DiskServerPlan."""

import contextlib
import logging
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path

from katapod.host.jail import Program, running_in_jail
from katapod.host.logs import kept_pipe, read_tail
from katapod.host.process import Child, find_program
from katapod.vmm.devices import Disk
from katapod.vmm.errors import VmmFailed
from katapod.vmm.uml.disks import LIBRARIES, PROGRAM, DiskServerPlan

__all__ = ["STORAGE_DAEMON", "DiskServer", "has_disk_server", "serving_disk"]

log = logging.getLogger(__name__)

STORAGE_DAEMON = "qemu-storage-daemon"
LOG_BYTES = 64 * 1024
SAID_LINES = 5


def has_disk_server() -> bool:
    """Whether this host can serve disks."""
    return shutil.which(STORAGE_DAEMON) is not None


class DiskServer:
    """When it ends while the kernel lives, the guest's disk answers nothing any more."""

    def __init__(self, child: Child, log_path: Path) -> None:
        self.child = child
        self.log_path = log_path

    async def wait_end(self) -> str:
        """Block until it has ended; returns how, in words."""
        await self.child.process.wait()
        return self.child.describe_end()

    def explain_end(self) -> VmmFailed:
        said = read_tail(self.log_path, max_lines=SAID_LINES)
        text = f"{STORAGE_DAEMON} ended unexpectedly: {self.child.describe_end()}"
        return VmmFailed(text + (f"; it said: {said}" if said else ""), command=" ".join(self.child.argv))


@contextlib.asynccontextmanager
async def serving_disk(
    disk: Disk, listener: socket.socket, monitor: socket.socket, *, vm_dir: Path, uid: int, log_path: Path
) -> AsyncIterator[DiskServer]:
    """Serve a disk at a listening socket, which may be connected to at once; kill the daemon at the end. Both sockets
    are the caller's, who may close them once this yields. An overlay has been made. Its argv[0] names `vm_dir`, by
    which a fresh process finds it.

    Raises MissingProgram, HostLacks, CannotRun.
    """
    program = Path(find_program(STORAGE_DAEMON, package="qemu-utils"))  # in Debian 12 a part of what QEMU needs
    plan = DiskServerPlan(program.resolve(), disk)
    log.debug("%s", plan.describe())
    present = {path: Path(path).resolve() for path in LIBRARIES if Path(path).is_dir()}
    fds = (listener.fileno(), monitor.fileno())
    async with kept_pipe(log_path, LOG_BYTES) as said_to:  # bounded: the guest can provoke its messages
        command = Program(PROGRAM, (f"{STORAGE_DAEMON} {vm_dir}", *plan.words(*fds)), {"LC_ALL": "C.UTF-8"})
        jailed = running_in_jail(plan.jail(uid, present), command, output=said_to.write_end, pass_fds=fds, soft=False)
        async with jailed as child:
            said_to.close()
            yield DiskServer(child, log_path)
