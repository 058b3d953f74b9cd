"""The pool's part of `kata-runtime factory`: init serves it, status shows it, destroy ends it."""

import asyncio
import gc
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from katapod.cli.handed_over import read_exec
from katapod.cli.settings import Globals
from katapod.model.errors import KatapodError
from katapod.supervisor import pool_wire as wire
from katapod.supervisor.pool_client import exchange

if TYPE_CHECKING:
    from katapod.model.config import Config

__all__ = ["end_pool", "pool_status", "print_pool", "serve_pool"]

ANSWER_LIMIT_S = 60.0  # to end its machines it may take half of that


def serve_pool(settings: Globals, config: "Config") -> int:
    """Keep machines ready until SIGTERM, SIGINT or `factory destroy`. Raises AlreadyExists, KatapodError."""
    from katapod.cli import main as program
    from katapod.sandbox.recovery import reap_dead
    from katapod.supervisor.pool_member import CommandLine, member_main
    from katapod.supervisor.pool_server import PoolServer, listening

    command_line = CommandLine(
        call=partial(program.call, program.load_command("run")),
        explain=program.explain,
        flush_output=program.flush_output,
    )
    context = settings.run_context(read_exec)

    def live(control: socket.socket) -> int:
        return member_main(context, command_line, control)

    def clean_up() -> None:
        asyncio.run(reap_dead(context.states()))

    with listening(Path(config.factory.vm_cache_endpoint)) as listener:
        clean_up()  # after a server that was killed
        gc.freeze()  # members share what is there; a collection would make copies of it
        PoolServer(listener, config.factory.vm_cache_number, live, clean_up).serve()
    return 0


def pool_status(config: "Config") -> dict[str, Any] | None:
    """What the server says of itself: pid, and vms with pid, cpu, memory (MiB). None where none is."""
    answer = _ask(config, wire.STATUS)
    if answer is None:
        return None
    found: dict[str, Any] = msgspec.json.decode(answer)
    return found


def print_pool(config: "Config") -> bool:
    """The lines are upstream's. Returns whether there is a server."""
    status = pool_status(config)
    if status is None:
        print("VM cache server is not running")
        return False
    print(f"VM cache server pid = {status['pid']}")
    for vm in status["vms"]:
        print(f"VM pid = {vm['pid']} Cpu = {vm['cpu']} Memory = {vm['memory']}MiB")
    return True


def end_pool(config: "Config") -> bool:
    """Ask the server to end, and its idle machines with it; returns whether there was one."""
    return _ask(config, wire.QUIT) is not None


def _ask(config: "Config", kind: bytes) -> bytes | None:
    endpoint = config.factory.vm_cache_endpoint
    try:
        return exchange(endpoint, kind, ANSWER_LIMIT_S)
    except OSError as exc:
        raise KatapodError(f"cannot query the server of the pool at {endpoint}: {exc.strerror or exc}") from exc
