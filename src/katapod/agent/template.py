"""Preparing the guest for being saved as a template."""

from __future__ import annotations

import gc
import mmap
import os

from katapod.agent import crun, log, methods, trace
from katapod.agent.limits import parse_high_pages
from katapod.agent.program import ProgramError, in_child
from katapod.rpc.pb import katapod_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.agent.loop import Loop
    from katapod.agent.sandbox import Agent

MARGIN_BYTES = 16 << 20  # kept free beyond the kernel's reserve
PAGE_TABLE_SHARE = 512  # a page table entry of 8 bytes per page of 4096
CHUNK_BYTES = 4 << 20
ZERO_LIMIT_S = 600.0  # the host has a limit of its own, which knows how much CPU we had
USED_SOON = ("_socket", "fcntl", "time", "katapod.agent.program", "katapod.kernel.mount", "katapod.kernel.process")


async def settle(agent: Agent, request: katapod_pb2.SettleRequest) -> katapod_pb2.SettleResponse:
    """Load every module that a first container needs, then clean up memory."""
    for name in methods.MODULES:
        methods.load_module(name)
    for name in USED_SOON:
        __import__(name)
    _ = agent.storages, agent.oom
    crun.sealed_binary()
    gc.collect()
    gc.freeze()  # these objects stay: clones need not collect them
    zeroed = await zero_free_memory(agent.loop) if request.zero_free_memory else 0
    return katapod_pb2.SettleResponse(zeroed_bytes=zeroed)


async def read_trace(agent: Agent, request: katapod_pb2.TraceRequest) -> katapod_pb2.TraceResponse:
    spans = [
        katapod_pb2.Span(name=name, start_ns=start_ns, duration_ns=duration_ns)
        for name, start_ns, duration_ns in trace.spans()
    ]
    return katapod_pb2.TraceResponse(spans=spans)


async def zero_free_memory(loop: Loop) -> int:
    """Allocate nearly all free memory, which the kernel zeroes, and free it again; returns bytes, 0 if it ran out."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as handle:
        handle.write("3")
    with open("/proc/meminfo") as handle:
        free_kib = next(int(line.split()[1]) for line in handle if line.startswith("MemFree:"))
    free = free_kib << 10
    with open("/proc/zoneinfo") as handle:
        kept_back = parse_high_pages(handle.read()) * mmap.PAGESIZE
    wanted = max(0, free - kept_back - free // PAGE_TABLE_SHARE - MARGIN_BYTES)
    return await zero_chunks(loop, wanted // CHUNK_BYTES)


async def zero_chunks(loop: Loop, chunks: int) -> int:
    """By a child, which the kernel ends where memory runs out; if init took it the kernel would panic.

    What was free may be lent out in a moment: free pages are reported to the host, some 64 MiB at a time
    (mm/page_reporting.c), which a busy host gives back late.
    """
    try:
        await in_child(loop, lambda: take(chunks), ZERO_LIMIT_S)
    except ProgramError as exc:
        log.info(f"not all free memory is zeroed: {exc}")
        return 0
    return chunks * CHUNK_BYTES


def take(chunks: int) -> str:
    """Have so many chunks of memory for a moment, as the first to be ended where it runs out. Raises OSError."""
    with open("/proc/self/oom_score_adj", "w") as handle:
        handle.write("1000")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    taken = [mmap.mmap(-1, CHUNK_BYTES, flags=flags) for _ in range(chunks)]
    return str(len(taken))
