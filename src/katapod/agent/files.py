"""Files that the host sends in chunks (CopyFile), and a file of a container read for it.

Every directory of a path is opened without following links, so that nothing that a container has put into the shared
tree can lead the agent elsewhere.
"""

from __future__ import annotations

import os
import stat

from katapod.agent.paths import SHARED
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.agent.sandbox import Agent
    from katapod.rpc.pb import agent_pb2

__all__ = ["copy_into", "split_path"]

CHUNK_MAX = 1024 * 1024
TERMINATION_LOG_MAX = 4096
TERMINATION_PATHS = (
    "io.kubernetes.container.terminationMessagePath",
    "io.kubernetes.cri.termination-message-path",
)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _invalid(text: str) -> RpcError:
    return RpcError(StatusCode.INVALID_ARGUMENT, text)


def split_path(path: str, root: str) -> list[str]:
    """The parts of `path` below `root`. Raises RpcError (INVALID_ARGUMENT) unless it is below."""
    parts = path.removeprefix(f"{root}/").split("/")
    if not path.startswith(f"{root}/") or any(part in ("", ".", "..") for part in parts) or "\0" in path:
        raise _invalid(f"cannot copy to {path[:500]!r}: it must be a plain path below {root}")
    return parts


def _open_directory(root: str, parts: list[str], mode: int) -> int:
    """Open root/parts, creating what is missing. The caller owns the descriptor. Raises OSError."""
    os.makedirs(root, mode=0o755, exist_ok=True)
    fd = os.open(root, _DIRECTORY)
    for part in parts:
        try:
            try:
                child = os.open(part, _DIRECTORY, dir_fd=fd)
            except FileNotFoundError:
                os.mkdir(part, dir_fd=fd)
                child = os.open(part, _DIRECTORY, dir_fd=fd)
                os.fchmod(child, mode)
        finally:
            os.close(fd)
        fd = child
    return fd


def copy_into(root: str, request: agent_pb2.CopyFileRequest) -> None:
    """Carry out one CopyFile below `root`. Raises RpcError, OSError.

    Regular files are written under a temporary name and renamed when they are complete.
    """
    *parents, name = split_path(request.path, root)
    if len(request.data) > CHUNK_MAX:
        raise _invalid(f"cannot copy to {request.path}: the chunk exceeds {CHUNK_MAX} bytes")
    if request.file_size < 0 or not 0 <= request.offset <= request.file_size:
        raise _invalid(f"cannot copy to {request.path}: offset {request.offset} of size {request.file_size}")
    kind = stat.S_IFMT(request.file_mode)
    mode = stat.S_IMODE(request.file_mode)
    directory = _open_directory(root, parents, stat.S_IMODE(request.dir_mode) or 0o755)
    try:
        if kind == stat.S_IFDIR:
            os.close(_make_directory(directory, name, request))
        elif kind == stat.S_IFLNK:
            _make_link(directory, name, request)
        elif kind in (0, stat.S_IFREG):
            _write_chunk(directory, name, mode, request)
        else:
            raise _invalid(f"cannot copy to {request.path}: not a file, directory or symbolic link")
    finally:
        os.close(directory)


def _make_directory(directory: int, name: str, request: agent_pb2.CopyFileRequest) -> int:
    if not _exists(directory, name):
        os.mkdir(name, dir_fd=directory)
    fd = os.open(name, _DIRECTORY, dir_fd=directory)
    os.fchown(fd, request.uid, request.gid)
    os.fchmod(fd, stat.S_IMODE(request.file_mode))
    return fd


def _exists(directory: int, name: str) -> bool:
    try:
        os.lstat(name, dir_fd=directory)
    except FileNotFoundError:
        return False
    return True


def _make_link(directory: int, name: str, request: agent_pb2.CopyFileRequest) -> None:
    temporary = f".{name[:200]}.tmp"
    _remove(directory, temporary)
    os.symlink(bytes(request.data), temporary.encode(), dir_fd=directory)
    os.chown(temporary, request.uid, request.gid, dir_fd=directory, follow_symlinks=False)
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)


def _write_chunk(directory: int, name: str, mode: int, request: agent_pb2.CopyFileRequest) -> None:
    temporary = f".{name[:200]}.tmp"
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if request.offset == 0:
        _remove(directory, temporary)
        flags |= os.O_CREAT | os.O_EXCL
    fd = os.open(temporary, flags, 0o600, dir_fd=directory)
    try:
        view = memoryview(request.data)
        at = request.offset
        while view:
            written = os.pwrite(fd, view, at)
            view, at = view[written:], at + written
        size = os.fstat(fd).st_size
        if size < request.file_size:
            return
        os.ftruncate(fd, request.file_size)
        os.fchown(fd, request.uid, request.gid)
        os.fchmod(fd, mode or 0o644)
    finally:
        os.close(fd)
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)


def _remove(directory: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return


async def copy_file(agent: Agent, request: agent_pb2.CopyFileRequest) -> None:
    copy_into(SHARED, request)


async def get_diagnostic_data(
    agent: Agent, request: agent_pb2.GetDiagnosticDataRequest
) -> agent_pb2.GetDiagnosticDataResponse:
    """The first 4096 bytes of a Kubernetes container's termination message."""
    from katapod.agent.containers import find_container
    from katapod.agent.rootfs import Root
    from katapod.rpc.pb import agent_pb2

    container = find_container(agent, request.container_id)
    if request.log_type != "termination_log":
        raise _invalid(f"cannot get diagnostic data: unknown log type {request.log_type[:64]!r}")
    path = next((container.annotations[key] for key in TERMINATION_PATHS if key in container.annotations), "")
    if not path.startswith("/"):
        raise RpcError(StatusCode.NOT_FOUND, f"container {container.id} has no termination message path")

    bound = next((source for source, destination in container.binds if destination == path), "")
    root = Root("/" if bound else f"{container.bundle}/rootfs")
    try:
        data = root.read(bound or path, TERMINATION_LOG_MAX) or b""
    finally:
        root.close()
    return agent_pb2.GetDiagnosticDataResponse(data=data.decode(errors="replace"))
