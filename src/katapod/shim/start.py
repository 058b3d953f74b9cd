"""`start`: find or make the server of a sandbox, and print its address. Light: containerd waits for it.

The server is a fork of this process, which has nothing loaded yet but what this needs; it loads the rest while
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
    from katapod.shim.main import Arguments

__all__ = ["SERVER_FD", "SOCKET_ROOT", "StartError", "pod_of", "serve_forever", "socket_path", "start"]

SERVER_FD = 3
SOCKET_ROOT = "/run/containerd/s"
STDIN_MAX = 10 * 1024 * 1024  # bytes, containerd's own limit
CONFIG_MAX = 16 * 1024 * 1024
BACKLOG = 128


class StartError(Exception):
    """A sentence for containerd's log and its caller."""


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
    if listener is None:  # an earlier `start` of the same sandbox, whose answer was lost
        _answer(path)
        return
    pid = 0
    try:
        pid = os.fork()
        if pid == 0:
            os._exit(_become_server(arguments, listener))
        _write("shim.pid", str(pid))
        _answer(path)
    except BaseException:  # nobody will learn of the server
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
    """The id of the sandbox that a container belongs to; None if it is a sandbox itself, or on its own.

    Raises StartError for a kind that does not exist, or a container of a pod without the pod's id.
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
    """Where the server of a sandbox listens. The formula is containerd's, whose paths are joined and cleaned."""
    import hashlib

    text = os.path.normpath("/".join(part for part in (grpc_address, namespace, sandbox_id) if part))
    if text.startswith("//"):  # two slashes, and no more, mean something else to POSIX
        text = text[1:]
    return f"{root}/{hashlib.sha256(text.encode()).hexdigest()}"


def _read_stdin() -> bytes:
    """What containerd has to say: options, or more of them; nothing under CRI-O."""
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
    """Whether containerd (2.3 and later) sent BootstrapParams: options parse as these too, but name no instance."""
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
    """Bind and listen; None if a server answers there already. Raises StartError, OSError."""
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    for attempt in range(2):
        try:
            listener.bind(path)
            break
        except OSError as exc:
            if exc.errno != 98 or attempt:  # EADDRINUSE
                raise StartError(f"cannot listen on {path}: {exc.strerror or exc}") from exc
            if _answers(path):
                listener.close()
                return None
            os.unlink(path)  # left by a server that was killed
    os.chmod(path, 0o600)
    listener.listen(BACKLOG)
    return listener


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def _answer(path: str) -> None:
    """The address, for containerd and, in the bundle, for who finds the server again after a restart."""
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
    """The child: a session of its own, its output goes to containerd's log; descriptor 3 listens."""
    status = 1
    path = listener.getsockname()

    def end(number: int, frame: object) -> None:
        """Until the server has handlers of its own: the socket must not stay."""
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
        os.closerange(SERVER_FD + 1, 256)  # what containerd let us inherit is not the sandbox's business
        serve_forever(arguments, SERVER_FD)
        status = 0
    except BaseException as exc:
        os.write(2, f"containerd-shim-kata-v2: {type(exc).__name__}: {exc}\n".encode())
    return status


def _open_log() -> int:
    """The FIFO that containerd reads; -1 if there is none. Open for reading too: a containerd that goes away must not
    end us by SIGPIPE."""
    try:
        if not stat.S_ISFIFO(os.stat("log").st_mode):
            return -1
        return os.open("log", os.O_RDWR | os.O_NONBLOCK)
    except OSError:
        return -1


def serve_forever(arguments: Arguments, listener_fd: int) -> None:
    """Serve until Shutdown. Everything heavy is loaded here. Raises StartError."""
    import gc

    gc.disable()  # it would look again and again through modules that stay: a tenth of the time to load them
    from katapod.shim.serve import run_server

    gc.freeze()
    gc.enable()
    try:
        listener = socket.socket(fileno=listener_fd)
    except OSError as exc:
        raise StartError(
            f"cannot serve: descriptor {listener_fd} is not a listening socket: {exc.strerror}; engines call start"
        ) from exc
    run_server(arguments, listener)
