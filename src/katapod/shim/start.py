"""`start`: find or start the server of a sandbox, and print its address. Imports little: containerd waits for it.

The server is a fork of this process, which has loaded no more than it needs so far; the fork loads the rest while
containerd connects. Source: core/runtime/v2/README.md of containerd.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import sys

from katapod.model.pod_keys import CONTAINER, KINDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.shim.arguments import Arguments

__all__ = ["SERVER_FD", "SOCKET_ROOT", "StartError", "pod_of", "serve_forever", "socket_path", "start"]

SERVER_FD = 3
SOCKET_ROOT = "/run/containerd/s"
STDIN_MAX = 10 * 1024 * 1024  # bytes, containerd's own limit
CONFIG_MAX = 16 * 1024 * 1024
BACKLOG = 128
ANSWER_LIMIT_S = 2.0  # a server that has just been started loads its modules first


class StartError(Exception):
    """An error message for containerd's log and its client."""


def start(arguments: Arguments) -> None:
    """Print the address of the server. Raises StartError, OSError."""
    given = _read_stdin()
    sandbox_id = pod_of(read_annotations("config.json"), "config.json")
    root = SOCKET_ROOT
    if _is_bootstrap(given, arguments):
        root = _socket_dir(given) or root
    path = socket_path(root, arguments.address, arguments.namespace, sandbox_id or arguments.id)
    if sandbox_id is not None:  # its sandbox has a server
        _answer(path)
        return
    listener = _listen(path)
    if listener is None:  # an earlier `start` of the same sandbox, whose output was lost
        _answer(path)
        return
    pid = 0
    try:
        pid = os.fork()
        if pid == 0:
            os._exit(_become_server(arguments, listener))
        _write("shim.pid", str(pid))
        _answer(path)
    except BaseException:  # nobody will learn about the server
        if pid > 0:
            os.kill(pid, signal.SIGKILL)
        os.unlink(path)
        raise


def read_annotations(path: str) -> dict[str, str]:
    """The annotations of an OCI spec, without the rest of it. Raises StartError."""
    import json

    try:
        with open(path, "rb") as handle:
            data = handle.read(CONFIG_MAX + 1)
        if len(data) > CONFIG_MAX:
            raise StartError(f"cannot read {os.path.abspath(path)}: it has more than {CONFIG_MAX} bytes")
        spec = json.loads(data)
        annotations = (spec.get("annotations") if isinstance(spec, dict) else None) or {}
    except OSError as exc:
        raise StartError(f"cannot read {os.path.abspath(path)}: {exc.strerror}") from exc
    except ValueError as exc:
        raise StartError(f"cannot read {os.path.abspath(path)}: it is not JSON: {exc}") from exc
    if not isinstance(annotations, dict) or not all(isinstance(value, str) for value in annotations.values()):
        raise StartError(f"cannot read {os.path.abspath(path)}: annotations must be an object whose values are strings")
    return annotations


def pod_of(annotations: dict[str, str], where: str) -> str | None:
    """The id of the sandbox that a container belongs to; None if it is a sandbox itself, or a single container.

    Raises StartError for an unknown kind, or a container of a pod without the pod's id.
    """
    for key, sandbox, id_key in KINDS:
        kind = annotations.get(key)
        if kind is None:
            continue
        if kind == sandbox:
            return None
        if kind != CONTAINER:
            raise StartError(
                f"cannot start: {where} has the annotation {key}={kind!r}: it must be {sandbox} or {CONTAINER}"
            )
        if not annotations.get(id_key):
            raise StartError(f"cannot start: {where} is of a container in a pod, but lacks {id_key}, the pod's id")
        return annotations[id_key]
    return None


def socket_path(root: str, grpc_address: str, namespace: str, sandbox_id: str) -> str:
    """Where the server of a sandbox listens, by containerd's formula, which joins and cleans paths."""
    import hashlib

    text = os.path.normpath("/".join(part for part in (grpc_address, namespace, sandbox_id) if part))
    if text.startswith("//"):  # exactly two leading slashes have another meaning in POSIX
        text = text[1:]
    return f"{root}/{hashlib.sha256(text.encode()).hexdigest()}"


def _read_stdin() -> bytes:
    """What containerd sends: the options or BootstrapParams; nothing under CRI-O."""
    if os.isatty(0):
        return b""
    found = b""
    try:
        while len(found) <= STDIN_MAX and (chunk := os.read(0, 65536)):
            found += chunk
    except OSError:  # closed
        return b""
    if len(found) > STDIN_MAX:
        raise StartError(f"cannot start: standard input has more than {STDIN_MAX} bytes")
    return found


def _is_bootstrap(given: bytes, arguments: Arguments) -> bool:
    """Whether containerd (2.3 and later) sent BootstrapParams. Options parse as these too, but name no instance."""
    head = b""
    for tag, text in ((b"\x0a", arguments.id), (b"\x12", arguments.namespace)):
        data = text.encode()
        if len(data) > 127:
            return False
        head += tag + bytes([len(data)]) + data
    return given.startswith(head)


def _socket_dir(given: bytes) -> str:
    from katapod.shim.pb import runtime_pb2

    try:
        return str(runtime_pb2.BootstrapParams.FromString(given).socket_dir)
    except Exception as exc:
        raise StartError(f"cannot start: standard input cannot be parsed: {exc}") from exc


def _listen(path: str) -> socket.socket | None:
    """Bind and listen; None if a server lives there already. Raises StartError, OSError."""
    directory = os.path.dirname(path)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    for attempt in range(2):
        try:
            listener.bind(path)
            break
        except OSError as exc:
            if exc.errno != 98 or attempt:  # EADDRINUSE
                raise StartError(f"cannot listen on {path}: {exc.strerror or exc}") from exc
            if _is_alive(path):
                listener.close()
                return None
            os.unlink(path)  # left by a server that was killed
    os.chmod(path, 0o600)
    listener.listen(BACKLOG)
    return listener


def _is_alive(path: str) -> bool:
    """Whether a server lives at a socket. The kernel lets go of a killed process's memory before its sockets, so a
    connection to it may succeed, and is reset a moment later. A server that lives answers, or keeps the connection."""
    from katapod.rpc.framing import encode_request

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
            probe.sendall(encode_request(1, "containerd.task.v2.Task", "Connect", b"", 0))
            probe.settimeout(ANSWER_LIMIT_S)
            return bool(probe.recv(1))
        except TimeoutError:
            return True
        except OSError:
            return False


def _answer(path: str) -> None:
    """Print the address for containerd, and write it to the bundle, where it is found after a restart."""
    _write("address", f"unix://{path}")
    sys.stdout.write(f"unix://{path}")
    sys.stdout.flush()


def _write(path: str, text: str) -> None:
    """Raises StartError."""
    try:
        with open(f".{path}", "w") as handle:
            handle.write(text)
        os.rename(f".{path}", path)
    except OSError as exc:
        raise StartError(f"cannot write {os.path.abspath(path)}: {exc.strerror}") from exc


def _become_server(arguments: Arguments, listener: socket.socket) -> int:
    """The child: in a session of its own, with its output in containerd's log, listening on descriptor 3."""
    status = 1
    path = listener.getsockname()

    def end(number: int, frame: object) -> None:
        """Until the server has its own handlers: the socket must not be left behind."""
        os.unlink(path)
        os._exit(128 + number)

    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, end)
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        output = _open_log()
        for number in (1, 2):
            os.dup2(output if output >= 0 else null, number)
        if listener.fileno() != SERVER_FD:
            os.dup2(listener.fileno(), SERVER_FD)
            listener.close()
        else:
            listener.detach()
        os.closerange(SERVER_FD + 1, 256)  # the sandbox must not keep what containerd lets us inherit
        serve_forever(arguments, SERVER_FD)
        status = 0
    except BaseException as exc:
        os.write(2, f"containerd-shim-kata-v2: {type(exc).__name__}: {exc}\n".encode())
    return status


def _open_log() -> int:
    """The FIFO that containerd reads; -1 if there is none. Opened for reading too: the end of containerd must not cause
    SIGPIPE."""
    try:
        if not stat.S_ISFIFO(os.stat("log").st_mode):
            return -1
        return os.open("log", os.O_RDWR | os.O_NONBLOCK)
    except OSError:
        return -1


def serve_forever(arguments: Arguments, listener_fd: int) -> None:
    """Serve until Shutdown. All large imports happen here. Raises StartError."""
    import gc

    gc.disable()  # repeated collections while loading modules, none of which are garbage, take a tenth of the time
    from katapod.shim.serve import run_server

    gc.freeze()
    gc.enable()
    try:
        listener = socket.socket(fileno=listener_fd)
    except OSError as exc:
        raise StartError(
            f"cannot serve: descriptor {listener_fd} is not a listening socket: {exc.strerror}; use the action start"
        ) from exc
    run_server(arguments, listener)
