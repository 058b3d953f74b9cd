"""Starting a process through crun: its user, its streams or terminal, and the causes of failures."""

from __future__ import annotations

import os
import struct

from katapod.agent import crun, log, rootfs, users
from katapod.agent.loop import Loop
from katapod.agent.process import Process, Stdio, open_streams
from katapod.agent.program import ProgramError, in_child
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from typing import Any

    from katapod.agent.spare import Spare
    from katapod.rpc.pb import agent_pb2, oci_pb2

    Binds = Sequence[tuple[str, str]]

__all__ = ["Launch", "resolve_process"]

CHILD_LIMIT_S = 10.0
CONSOLE_LIMIT_S = 10.0
_FAILURES = {
    "not in PATH": (StatusCode.NOT_FOUND, 'exec: "{command}": executable file not found in $PATH'),
    "missing": (StatusCode.NOT_FOUND, 'exec: "{command}": no such file or directory'),
    "denied": (StatusCode.PERMISSION_DENIED, 'exec: "{command}": permission denied'),
    "no cwd": (StatusCode.NOT_FOUND, 'cannot change to the working directory "{cwd}": no such file or directory'),
    "cwd is no directory": (StatusCode.NOT_FOUND, 'cannot change to the working directory "{cwd}": not a directory'),
    "cwd denied": (StatusCode.PERMISSION_DENIED, 'cannot change to the working directory "{cwd}": permission denied'),
}
"""By the results of find_command. Docker and Podman look for these phrases, to choose between the exit statuses 125,
126 and 127."""
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _environment(process: oci_pb2.Process, key: str) -> str | None:
    found = [entry.partition("=")[2] for entry in process.Env if entry.startswith(f"{key}=")]
    return found[-1] if found else None


async def resolve_process(
    loop: Loop, process: oci_pb2.Process, string_user: agent_pb2.StringUser, path: str, *, make_cwd: bool
) -> None:
    """Complete `process` from the root file system at `path`: the ids of a named user, and HOME; create a missing
    working directory; reject a command that has a format that cannot run.

    Raises RpcError (INVALID_ARGUMENT, PERMISSION_DENIED), OSError.
    """
    for limit in process.Rlimits:
        if limit.Type == "RLIMIT_NOFILE":
            from katapod.agent.limits import allow_open_files

            allow_open_files(limit.Hard)
    root = rootfs.Root(path)
    try:
        _resolve_user(process, string_user, root)
        cwd = process.Cwd or "/"
        if make_cwd and cwd.startswith("/") and root.lacks_directory(cwd):
            await _make_directories(loop, path, cwd)
        head = root.program_head(process.Args[0], _environment(process, "PATH") or DEFAULT_PATH, cwd)
    finally:
        root.close()
    cause = rootfs.describe_format(head, os.uname().machine) if head is not None else ""
    if cause:
        raise RpcError(StatusCode.PERMISSION_DENIED, f'exec: "{process.Args[0][:200]}": exec format error: {cause}')


def _resolve_user(process: oci_pb2.Process, string_user: agent_pb2.StringUser, root: rootfs.Root) -> None:
    user, _, group = string_user.uid.partition(":")
    group = group or string_user.gid
    named = bool(user or group or string_user.additionalGids)
    need_home = not _environment(process, "HOME")
    if not (named or need_home):
        return
    passwd = root.read_text("/etc/passwd")
    if named:
        try:
            found = users.resolve_user(
                user or str(process.User.UID),
                group,
                list(string_user.additionalGids),
                passwd,
                root.read_text("/etc/group"),
            )
        except users.UnknownUser as exc:
            raise RpcError(StatusCode.INVALID_ARGUMENT, str(exc)) from exc
        process.User.UID, process.User.GID = found.uid, found.gid
        del process.User.AdditionalGids[:]
        process.User.AdditionalGids.extend(found.groups)
    if need_home:
        process.Env.append(f"HOME={users.find_home(process.User.UID, passwd)}")


async def _make_directories(loop: Loop, root: str, directory: str) -> None:
    """If it cannot be created (a read-only root, a file in its place), crun reports that."""

    def make() -> str:
        rootfs.enter_root(root)
        os.makedirs(directory, mode=0o755, exist_ok=True)
        return ""

    try:
        await in_child(loop, make, CHILD_LIMIT_S)
    except ProgramError as exc:
        log.debug(f"cannot make the working directory: {exc}")


class Launch:
    """One launch of a process."""

    def __init__(self, loop: Loop, process: oci_pb2.Process, root: str, binds: Binds, nice: int = 0) -> None:
        """`root` and `binds` (source, destination) show the container's files, to explain a failure. `nice`: the
        priority of crun, which the process has then."""
        self._loop = loop
        self._process = process
        self._root = root
        self._binds = binds
        self._nice = nice

    async def run(self, exec_id: str, arguments: list[str], directory: str, pipe_size_bytes: int) -> Process:
        """Call crun with `arguments` (verb first, container id last); temporary files go to `directory`.

        Raises RpcError: NOT_FOUND or PERMISSION_DENIED about the command, else INTERNAL.
        """
        pid_path = f"{directory}/pid"
        arguments = [*arguments[:-1], "--pid-file", pid_path, arguments[-1]]
        if self._process.Terminal:
            return await self._launched(exec_id, self._with_terminal(arguments, directory), pid_path)
        return await self._launched(exec_id, self._with_pipes(arguments, pipe_size_bytes), pid_path)

    async def run_spare(self, exec_id: str, spare: Spare) -> Process:
        """The same by a crun that waited and has just been told. Raises RpcError, as `run`."""
        return await self._launched(exec_id, self._with_spare(spare), f"{spare.directory}/pid")

    async def _launched(self, exec_id: str, launch: Coroutine[Any, None, Stdio], pid_path: str) -> Process:
        self._loop.launch_begins()
        try:
            stdio = await launch
            try:
                with open(pid_path) as handle:
                    pid = int(handle.read())
                os.unlink(pid_path)
            except BaseException:
                stdio.close()
                raise
            return Process(exec_id, pid, stdio, self._loop.adopted_exit(pid))
        except ProgramError as exc:
            await self._explain()
            raise RpcError(StatusCode.INTERNAL, f"cannot run {self._name}: {exc.tail or exc}") from exc
        finally:
            self._loop.launch_ends()

    @property
    def _name(self) -> str:
        return f'"{self._process.Args[0][:200]}"'

    async def _with_pipes(self, arguments: list[str], pipe_size_bytes: int) -> Stdio:
        stdio, theirs = open_streams(self._loop, pipe_size_bytes)
        try:
            await crun.run(self._loop, arguments, theirs, self._nice)
        except BaseException:
            stdio.close()
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        return stdio

    async def _with_spare(self, spare: Spare) -> Stdio:
        try:
            await spare.call.finish()
        except BaseException:
            spare.stdio.close()
            raise
        return spare.stdio

    async def _with_terminal(self, arguments: list[str], directory: str) -> Stdio:
        """crun sends the terminal's master over our socket."""
        import _socket

        path = f"{directory}/console"
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK)
        try:
            # the path of a bundle may exceed the 107 bytes of a socket address: use a path through its directory
            fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                short = f"/proc/self/fd/{fd}/console"
                listener.bind(short)
            finally:
                os.close(fd)
            listener.listen(1)
            verb, *rest = arguments
            await crun.run(self._loop, [verb, "--console-socket", path, *rest], (null, null, null), self._nice)
            accept: Any = listener._accept  # type: ignore[attr-defined]
            connection = _socket.socket(fileno=accept()[0])
            try:
                ancillary = connection.recvmsg(4096, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC)[1]
            finally:
                connection.close()
            masters = [struct.unpack("i", data[:4])[0] for _, kind, data in ancillary if kind == _socket.SCM_RIGHTS]
            if not masters:
                raise ProgramError("crun did not pass the terminal")
        except BlockingIOError as exc:
            raise ProgramError("crun did not pass the terminal") from exc
        finally:
            listener.close()
            os.close(null)
            if os.path.exists(path):
                os.unlink(path)
        stdio = Stdio(self._loop, masters[0], masters[0], -1, terminal=True)
        size = self._process.ConsoleSize
        if size.Height and size.Width:
            stdio.resize(size.Height, size.Width)
        return stdio

    async def _explain(self) -> None:
        """Raise RpcError if the command or its directory is the cause: looked up as the container would."""
        process = self._process
        path = _environment(process, "PATH") or DEFAULT_PATH
        user = process.User

        def look_up() -> str:
            rootfs.enter_root(self._root, self._binds)
            return rootfs.find_command(
                process.Args[0], path, process.Cwd or "/", user.UID, user.GID, list(user.AdditionalGids)
            )

        try:
            found = await in_child(self._loop, look_up, CHILD_LIMIT_S)
        except ProgramError:
            return  # then crun's message is better
        if found in _FAILURES:
            code, words = _FAILURES[found]
            raise RpcError(code, words.format(command=process.Args[0][:200], cwd=process.Cwd[:200]))
