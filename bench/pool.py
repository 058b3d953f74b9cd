"""Katapod's pool: its server, for as long as the benchmark runs, and the wait until it has a machine ready."""

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator

from bench.contestants import Contestant, Katapod
from bench.measure import BenchError, execute

__all__ = ["served", "wait_ready"]

READY_LIMIT_S = 60.0
ASK_EVERY_S = 0.2
END_LIMIT_S = 40.0


@contextlib.contextmanager
def served(contestant: Katapod) -> Iterator[None]:
    """The server of the contestant's pool, with its first machine ready. Nothing, if it has no pool."""
    if not contestant.pool:
        yield
        return
    server = subprocess.Popen(
        contestant.call("factory", "init"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,  # it says next to nothing there
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        wait_ready(contestant)
        yield
    finally:
        server.terminate()
        try:
            server.communicate(timeout=END_LIMIT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.communicate()


def wait_ready(contestant: Contestant) -> None:
    """Until the pool is full: before a start, since that is what it is for, and after, so that filling it disturbs
    nobody else. Raises BenchError."""
    if not isinstance(contestant, Katapod) or not contestant.pool:
        return
    deadline = time.monotonic() + READY_LIMIT_S
    while time.monotonic() < deadline:
        shown = "".join(line for _, line in execute(contestant.call("factory", "status", "--json")).lines)
        cache = json.loads(shown).get("cache")
        if cache and len(cache["vms"]) >= contestant.pool:
            return
        time.sleep(ASK_EVERY_S)
    raise BenchError(f"{contestant.name}: the pool is not full after {READY_LIMIT_S:.0f} s")
