"""`run` in a machine that a pool keeps ready: hand over the command line and the streams, wait for the end.

Whatever does not fit or does not work before a member of the pool has taken the request is no error: `run` goes on
as it does without a pool. This module is loaded before all others and imports as little as it can; `_socket` and
`_signal` are what `socket` and `signal` wrap in enumerations, 5 ms of imports each.
"""

from __future__ import annotations

import _socket
import array
import os
import sys

from katapod import __version__
from katapod.supervisor import pool_wire as wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
else:
    import _signal as signal

__all__ = ["CONFIGURATION", "endpoint_of", "exchange", "hand_over", "receive", "run_in_pool"]

DEFAULT_ENDPOINT = "/var/run/kata-containers/cache.sock"
CONFIGURATION = ("--config", "--kata-config")
TAKE_LIMIT_S = 10.0  # for a member to answer: on a host that is so slow, a start without the pool takes longer
SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)
RUNTIME_FAILED = 125


def run_in_pool(words: list[str]) -> int | None:
    """Run the container in the pool and return its exit status; None if the caller has to do it."""
    verb, config = _leading_words(words)
    if verb != "run" or os.geteuid() != 0 or "KATA_CONF_FILE" in os.environ or "_KATA_RUNTIME_COMPLETE" in os.environ:
        return None
    try:
        files = wire.config_files(config)
        endpoint = endpoint_of(files)
        if not endpoint or _is_in_background():
            return None
        server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    except OSError:
        return None
    try:
        if not _is_taken(server, endpoint, _request(words, files)):
            return None
        _go(server)
        return _wait_end(server)
    except (OSError, wire.FrameError):
        return None
    finally:
        server.close()


def _leading_words(words: list[str]) -> tuple[str, str]:
    """(verb, configuration file): the first word that is no global option, and the last --config before it."""
    config = ""
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in CONFIGURATION:
            config = value if equals else next(rest, "")
        elif not word.startswith("-"):
            return word, config
    return "", config


def endpoint_of(files: list[str]) -> str:
    """The socket to try; empty where the configuration asks for no pool. Raises OSError.

    A guess, by the lines that people write: a TOML parser takes 20 ms to load. It decides nothing: a member refuses
    requests whose files are not the very ones that it has read itself, with such a parser.
    """
    number, endpoint = "0", DEFAULT_ENDPOINT
    for path in files:
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition("=")
                value = value.partition("#")[0].strip()
                if key.strip() == "vm_cache_number":
                    number = value
                elif key.strip() == "vm_cache_endpoint":
                    endpoint = value.strip("\"'") or DEFAULT_ENDPOINT
    return endpoint if number.isdigit() and int(number) > 0 else ""


def _is_in_background() -> bool:
    """A terminal stops a job that reads from it in the background; the pool's process is no job of it."""
    return os.isatty(0) and os.tcgetpgrp(0) != os.getpgrp()


def _request(words: list[str], files: list[str]) -> bytes:
    umask = os.umask(0o077)
    os.umask(umask)
    request = wire.Request(
        version=__version__.encode(),
        marks=[wire.fingerprint(files), *wire.namespaces()],
        umask=umask,
        words=[os.fsencode(word) for word in words],
        environment=[name + b"=" + value for name, value in os.environb.items()],
    )
    return wire.frame(wire.REQUEST, request.encode())


def _is_taken(server: _socket.socket, endpoint: str, request: bytes) -> bool:
    """Whether a member does it. Raises OSError, FrameError."""
    cwd = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return hand_over(server, endpoint, request, [0, 1, 2, cwd], TAKE_LIMIT_S)
    finally:
        os.close(cwd)


def hand_over(server: _socket.socket, path: str, request: bytes, descriptors: list[int], limit_s: float) -> bool:
    """Send a request by an unconnected socket to `path`, and hear whether it is taken. Raises OSError, FrameError."""
    server.settimeout(limit_s)
    server.connect(path)
    rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", descriptors))
    sent = server.sendmsg([request], [rights])
    server.sendall(request[sent:])
    return receive(server.recv)[0] == wire.TAKEN


def _go(server: _socket.socket) -> None:
    """From here on we do not go back: a signal that comes before its handler is set ends us, and the member sees it.
    Raises OSError."""
    server.sendall(wire.frame(wire.GO))

    def pass_on(number: int, _: object) -> None:
        try:
            server.sendall(wire.frame(wire.SIGNAL, b"%d" % number))
        except OSError:
            return  # it has ended, and we are about to hear of it

    for number in SIGNALS:
        signal.signal(number, pass_on)
    server.settimeout(None)


def _wait_end(server: _socket.socket) -> int:
    try:
        kind, payload = receive(server.recv)
        if kind == wire.EXIT:
            return int(payload)
    except (OSError, ValueError, wire.FrameError):
        pass
    sys.stderr.write("kata-runtime: the process of the pool that ran the container was killed\n")
    return RUNTIME_FAILED


def receive(recv: Callable[[int], bytes]) -> tuple[bytes, bytes]:
    """(kind, payload) of the next frame. Raises FrameError at the end of the stream."""

    def exactly(size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = recv(size - len(data))
            if not piece:
                raise wire.FrameError("the other side has gone")
            data += piece
        return data

    length, kind = wire.parse_header(exactly(wire.HEADER))
    return kind, exactly(length)


def exchange(endpoint: str, kind: bytes, timeout_s: float) -> bytes | None:
    """Ask the server for its status, or to quit; returns its answer, None where no server is. Raises OSError."""
    server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        server.settimeout(timeout_s)
        server.connect(endpoint)
        server.sendall(wire.frame(kind))
        return receive(server.recv)[1]
    except (FileNotFoundError, ConnectionRefusedError, wire.FrameError):
        return None
    finally:
        server.close()
