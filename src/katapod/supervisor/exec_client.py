"""`exec` by the process that holds the sandbox: hand over the words and the streams, wait for the end.

That process has every module loaded. Whatever does not fit, or fails before the command runs, is no error: `exec` goes
on as it does without it, and says what is wrong. As pool_client.py, this is loaded before all else.
"""

from __future__ import annotations

import _socket
import os
import sys

from katapod import __version__
from katapod.supervisor import pool_wire as wire
from katapod.supervisor.pool_client import CONFIGURATION, hand_over, receive

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Iterator
else:
    import _signal as signal

__all__ = ["PASSED", "exec_by_supervisor", "sandbox_named"]

STATE_ROOT = "/run/vc/sbs"
SOCKET = "exec.sock"
"""model.layout.Layout, which takes too long to import."""

TAKE_LIMIT_S = 1.0  # for an answer: a process that a signal has stopped gives none
PASSED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
RUNTIME_FAILED = 125

INTERACTIVE = ("-i", "--interactive")
FLAGS = (*INTERACTIVE, "--privileged")
WITH_VALUE = ("-e", "--env", "-w", "--workdir", "-u", "--user")
"""The flags of `exec` that may be handed over. A terminal, a debug console and --help are the caller's."""


def exec_by_supervisor(words: list[str]) -> int | None:
    """Run the command and return its exit status; None if the caller has to do it."""
    words = _behind_configuration(words)
    if words[:1] != ["exec"] or os.geteuid() != 0 or {"KATAPOD_TRACE", "_KATA_RUNTIME_COMPLETE"} & os.environ.keys():
        return None
    name = sandbox_named(words[1:])
    if not name:
        return None
    request = wire.Request(__version__.encode(), [], 0, [os.fsencode(word) for word in words[1:]], [])
    try:
        server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    except OSError:
        return None
    heard: list[int] = []

    def pass_on(number: int, _: object) -> None:
        heard.append(number)
        try:
            server.sendall(wire.frame(wire.SIGNAL, b"%d" % number))
        except OSError:
            return  # it has ended, and we are about to hear of it

    try:
        data = wire.frame(wire.REQUEST, request.encode())
        if not hand_over(server, f"{STATE_ROOT}/{name}/{SOCKET}", data, [0, 1, 2], TAKE_LIMIT_S):
            return None
        for number in PASSED:
            signal.signal(number, pass_on)
        server.sendall(wire.frame(wire.GO))
        server.settimeout(None)
        kind, payload = receive(server.recv)
    except (OSError, wire.FrameError):
        if signal.getsignal(signal.SIGINT) is not pass_on:
            return None  # it has not begun
        kind, payload = wire.FAILED, b""
    finally:
        server.close()
    if kind == wire.EXIT:
        return int(payload)
    if kind == wire.REFUSED:
        for number in PASSED:
            signal.signal(number, signal.SIG_DFL)
        if heard:
            os.kill(os.getpid(), heard[0])
        return None
    cause = payload.decode()
    if not cause:  # who has the sandbox says why, unless it was killed
        from katapod.sandbox.client import KILLED

        cause = f"the command in {name} was cut off: {KILLED}"
    sys.stderr.write(f"kata-runtime: {cause}\n")
    return RUNTIME_FAILED


def _behind_configuration(words: list[str]) -> list[str]:
    """Without the options that name a configuration: what runs in a container has been configured with its sandbox."""
    place = 0
    while place < len(words):
        name, equals, _ = words[place].partition("=")
        if name not in CONFIGURATION:
            break
        place += 1 if equals else 2
    return words[place:]


def sandbox_named(words: list[str]) -> str:
    """The sandbox that the words behind `exec` may name; empty if they are for the caller to read.

    Decides nothing: who has the sandbox reads the words as the caller would, and refuses what is not for it.
    """
    rest = iter(words)
    name = _skip_flags(rest)
    if not name or name.startswith((".", "-")) or "/" in name or next(rest, None) is None:
        return ""
    try:
        os.fstat(0), os.fstat(1), os.fstat(2)
    except OSError:  # closed
        return ""
    return name


def _skip_flags(rest: Iterator[str]) -> str:
    """The first word that is no flag; empty where there is none, or one that cannot be handed over."""
    for word in rest:
        if word in INTERACTIVE and os.isatty(0):
            return ""  # a terminal stops who reads from it in the background, and the other process is no job of it
        if word in WITH_VALUE:
            next(rest, None)
        elif word not in FLAGS and not word.startswith(("--env=", "--workdir=", "--user=")):
            return word
    return ""
