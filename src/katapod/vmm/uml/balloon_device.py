"""A virtio balloon for free page reporting only: the pages that a guest has freed go back to the host.

The driver reports free pages by chains of buffers, and keeps these from being used until it has them back. We punch
holes into the file of the guest's memory there: what a guest can make us free is its own memory. It is never asked to
inflate the balloon. Source: Virtual I/O Device (VIRTIO) 1.2, section 5.5; Linux' drivers/virtio/virtio_balloon.c.
"""

import asyncio
import contextlib
import functools
import logging
import socket
import struct
from collections.abc import AsyncIterator, Iterable, Iterator

from katapod.host.guest_memory import free_memory
from katapod.model.errors import KatapodError
from katapod.tasks import beside
from katapod.vmm.uml.backend import Backend, Queue, serve_first
from katapod.vmm.uml.edges import Edges
from katapod.vmm.uml.vhost_user import VhostUserFailed
from katapod.vmm.uml.virtqueue import Chain, Segment

__all__ = ["BALLOON_ID", "REPORTING", "Balloon", "serving_balloon"]

log = logging.getLogger(__name__)

BALLOON_ID = 5  # of this kind of device, for virtio_uml.device=SOCKET:ID
REPORTING = 1 << 5  # feature: free page reporting
REPORTED = 2  # its queue; those before it, inflate and deflate, are always there
QUEUES = 3
CHAIN_MAX = 1 << 40  # bytes; Linux reports 32 blocks of up to 4 MiB at once, and all of them are memory that is there
CHAINS_MAX = 32  # that are handled in one turn of the event loop
_CONFIG = struct.Struct("<IIII")  # pages wanted in the balloon, pages in it, a command, the value of poisoned pages


class Balloon:
    """`failure`: why it has ended by itself, if it has. `freed_bytes`: what was given back so far, holes included."""

    features = REPORTING
    config = _CONFIG.pack(0, 0, 0, 0)
    queue_count = QUEUES

    def __init__(self) -> None:
        self.failure: KatapodError | None = None
        self.freed_bytes = 0
        self.edges = Edges(self._fail)
        self._ended = asyncio.Event()
        self._queues: dict[int, Queue] = {}

    async def serve(self, listener: socket.socket) -> None:
        """Serve the first who connects, until it hangs up or breaks the rules. A guest goes on without its balloon."""
        backend = Backend(self, self.edges)
        try:
            await serve_first(listener, backend.serve, self._ended, "balloon")
        except (KatapodError, OSError) as exc:
            self._fail(exc)
        finally:
            self.close()
            backend.close()

    def close(self) -> None:
        """Idempotent."""
        self.edges.close()
        self._queues.clear()
        self._ended.set()

    def _fail(self, cause: Exception) -> None:
        if self.failure is None:
            said = cause if isinstance(cause, KatapodError) else VhostUserFailed(f"cannot serve a balloon: {cause}")
            self.failure = said
            log.warning("memory that the guest frees stays with it from now on: %s", said)
        self._ended.set()

    # Device

    def start(self, index: int, queue: Queue) -> None:
        self._queues[index] = queue

    def stop(self, index: int) -> None:
        self._queues.pop(index, None)

    def kicked(self, index: int) -> None:
        queue = self._queues.get(index)
        if queue is None:
            return
        chains = queue.virtqueue.take(CHAIN_MAX, CHAINS_MAX, chain_max=CHAIN_MAX)
        if index == REPORTED:
            self._free(chains)
        queue.give_back([(chain.head, 0) for chain in chains])
        if len(chains) == CHAINS_MAX:
            self.edges.go_on_later(functools.partial(self.kicked, index))

    def _free(self, chains: Iterable[Chain]) -> None:
        for fd, offset, length in _joined(segment for chain in chains for segment in chain.writable):
            free_memory(fd, offset, length)
            self.freed_bytes += length


def _joined(segments: Iterable[Segment]) -> Iterator[tuple[int, int, int]]:
    """Descriptor, offset and length of what the segments cover, neighbours as one: single pages are reported, too."""
    at: tuple[int, int, int] | None = None
    for fd, offset, length in sorted((each.fd, each.offset, each.length) for each in segments if each.length):
        if at is not None and at[0] == fd and offset <= at[1] + at[2]:
            at = fd, at[1], max(at[2], offset + length - at[1])
        else:
            if at is not None:
                yield at
            at = fd, offset, length
    if at is not None:
        yield at


@contextlib.asynccontextmanager
async def serving_balloon(listener: socket.socket) -> AsyncIterator[Balloon]:
    """Serve a balloon to the first guest that connects to `listener`, while the block runs. The listener is the
    balloon's from now on."""
    listener.setblocking(False)
    balloon = Balloon()
    with listener, contextlib.closing(balloon):
        async with beside(balloon.serve(listener), name="balloon"):
            yield balloon
