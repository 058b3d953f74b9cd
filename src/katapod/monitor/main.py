"""`kata-monitor`: the program."""

import asyncio
import logging
import os
import platform
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from katapod import __version__
from katapod.host.log_lines import log_to
from katapod.monitor.options import USAGE, Address, Options, UsageError, parse_options

if TYPE_CHECKING:
    from katapod.model.layout import Layout

__all__ = ["ListenError", "main", "running_monitor"]

log = logging.getLogger(__name__)

LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
    "panic": logging.CRITICAL,
}


class ListenError(Exception):
    """Cannot listen on the address."""


def main() -> int:
    try:
        options = parse_options(sys.argv[1:])
    except UsageError as exc:
        print(f"kata-monitor: {exc}\n  hint: kata-monitor --help", file=sys.stderr)
        return 2
    if options.help or options.version:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in `--help | head`: nothing to undo or to report
    if options.help:
        print(USAGE, end="")
        return 0
    if options.version:
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        print(f"kata-monitor\n Version:\t{__version__}\n Python version:\t{platform.python_version()}")
        print(f" Git commit:\tunknown\n OS/Arch:\tlinux/{machine}")
        return 0
    if os.geteuid() != 0:
        print("kata-monitor: cannot read the sandboxes of this host: only root may", file=sys.stderr)
        print("  hint: run it as root", file=sys.stderr)
        return 1
    if options.link:
        return _print_link(options.address)
    log_to(sys.stderr, LEVELS[options.log_level], "level=%(levelname)s %(name)s: %(message)s")
    if options.log_level == "trace":
        import tracemalloc

        tracemalloc.start()
    try:
        return asyncio.run(_serve(options))
    except ListenError as exc:
        print(f"kata-monitor: {exc}\n  hint: choose another with -listen-address HOST:PORT", file=sys.stderr)
        return 1


def _print_link(address: Address) -> int:
    """Print the link to the page, with the token, for root, who can read the token anyway."""
    from katapod.monitor.token import link_of, read_token

    try:
        print(link_of(str(Address(address.host or "127.0.0.1", address.port)), read_token()))
    except OSError as exc:
        print(f"kata-monitor: cannot read the token: {exc.strerror}: {exc.filename}", file=sys.stderr)
        return 1
    return 0


def _token() -> str:
    """The token; empty if it cannot be made: then nobody sees what only root may."""
    from katapod.monitor.token import read_token

    try:
        return read_token()
    except OSError as exc:
        log.warning("commands, errors and consoles are not shown: no token: %s: %s", exc.strerror, exc.filename)
        return ""


async def _serve(options: Options) -> int:
    """Serve until a signal; returns 0 after SIGTERM, 130 after Ctrl-C, 141 at once if nobody reads the address."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def end(status: int) -> None:
        if not ended.done():
            ended.set_result(status)

    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        loop.add_signal_handler(number, end, status)
    async with running_monitor(options.address, token=_token()) as address:
        if not address.is_loopback:
            log.warning("%s is reachable from outside: anyone who connects can read about all sandboxes", address)
        try:
            print(f"kata-monitor: http://{address}/", flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more at its end
            return 128 + signal.SIGPIPE
        return await ended


@asynccontextmanager
async def running_monitor(address: Address, layout: "Layout | None" = None, *, token: str) -> AsyncIterator[Address]:
    """Serve while the block runs; yields the address, with the actual port if 0 was asked for.

    `layout`: another place for the sandboxes, for tests. Raises ListenError.
    """
    from katapod.model import layout as where
    from katapod.monitor.fleet import Fleet
    from katapod.monitor.service import MonitorService
    from katapod.rpc.http import serve_http

    listener = _listen(address)
    found = Address(address.host, listener.getsockname()[1])
    moved = layout is not None
    layout = layout or where.Layout()
    fleet = Fleet(layout, (layout.state_root,) if moved else None)
    server = await serve_http(listener, MonitorService(layout, fleet, found, token).handle)
    try:
        yield found
    finally:
        await server.close()


def _listen(address: Address) -> socket.socket:
    """Raises ListenError."""
    try:
        kind, _, _, _, where = socket.getaddrinfo(
            address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(where[:2], family=kind, backlog=64)
    except OSError as exc:
        # create_server adds to the text; getaddrinfo has negative error numbers of its own
        why = os.strerror(exc.errno) if exc.errno is not None and exc.errno > 0 else exc.strerror or exc
        raise ListenError(f"cannot listen on {address}: {why}") from exc
