"""A crun that waits for the next exec of a container.

A large part of what an exec takes is crun's own start: loader, libraries, options. After an exec in a container another
crun is started, which does this part, and waits for the description of its process on a pipe, having touched nothing.
"""

from __future__ import annotations

import fcntl
import os

from katapod.agent import crun
from katapod.agent.loop import Future
from katapod.agent.process import Stdio, open_streams
from katapod.agent.program import ProgramError
from katapod.kernel.trees import remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.agent.loop import Loop

__all__ = ["Spare", "open_spare"]

LATER = 19  # nice(2): behind what the containers do
_count = 0


class Spare:
    """One such crun: `crun exec`, with streams and a pid file, in a directory of its own."""

    def __init__(self, call: crun.Call, stdio: Stdio, directory: str, write_end: int) -> None:
        self.call = call
        self.stdio = stdio
        self.directory = directory
        self.gone = Future()  # told or dropped
        self._write_end = write_end
        self._pipe_bytes = fcntl.fcntl(write_end, fcntl.F_GETPIPE_SZ)

    def tell(self, process: str, nice: int) -> bool:
        """Say what is to run; from then on it is a launch like others, of this priority. False if it cannot be told,
        and is dropped: it has ended, or that is too long for the pipe. Raises OSError."""
        data = process.encode()
        if self.call.program.exit_status.done or len(data) > self._pipe_bytes:
            self.drop()
            return False
        os.setpriority(os.PRIO_PROCESS, self.call.program.pid, nice)
        try:
            os.write(self._write_end, data)  # into an empty pipe with room for it
        except BrokenPipeError:
            self.drop()
            return False
        self._close()
        return True

    def drop(self) -> None:
        """End it. Idempotent, and nothing once it has been told. Raises OSError."""
        if self.gone.done:
            return
        self._close()
        self.call.program.kill()
        self.stdio.close()
        self.call.forget()
        remove_tree(self.directory)

    def _close(self) -> None:
        os.close(self._write_end)
        self.gone.set()


def open_spare(loop: Loop, container_id: str, bundle: str, pipe_size_bytes: int) -> Spare:
    """Start one. Raises ProgramError, OSError."""
    global _count
    _count += 1
    directory = f"{bundle}/spare-{_count}"
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        os.mkdir(directory)
        stdio, theirs = open_streams(loop, pipe_size_bytes)
        try:
            arguments = ["exec", "--detach", "--process", f"/proc/self/fd/{read_end}", "--pid-file", f"{directory}/pid"]
            call = crun.start(loop, [*arguments, container_id], theirs, (read_end,))
        except ProgramError:
            stdio.close()
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        os.setpriority(os.PRIO_PROCESS, call.program.pid, LATER)
    except BaseException:
        os.close(write_end)
        raise
    finally:
        os.close(read_end)
    return Spare(call, stdio, directory, write_end)
