"""Split virtqueues as a device sees them, over a descriptor of the guest's memory.

The memory is read and written by pread and pwrite, never mapped: whoever has the file can truncate it, which a mapping
answers with SIGBUS. All that lies in it is the guest's to change at any time: a value is read once, bounded, and then
used. What a driver may not do raises VhostUserFailed. Source: Virtual I/O Device (VIRTIO) 1.2, section 2.7.
"""

import fcntl
import os
import stat
import struct
from collections.abc import Sequence

from msgspec import Struct

from katapod.vmm.uml.vhost_user import Region, RingAddresses, VhostUserFailed

__all__ = ["CHAIN_MAX", "QUEUE_SIZE_MAX", "Chain", "GuestMemory", "Segment", "Virtqueue"]

QUEUE_SIZE_MAX = 1024  # entries; User-mode Linux takes 256
CHAIN_MAX = 1 << 20  # bytes of one chain; Linux' console driver sends 128 KiB at most
NEXT, WRITE, INDIRECT = 1, 2, 4  # flags of a descriptor
NO_INTERRUPT = 1  # of the available ring
NO_NOTIFY = 1  # of the used ring

_DESCRIPTOR = struct.Struct("<QIHH")
_HEAD = struct.Struct("<HH")  # flags and index, at the start of both rings
_USED = struct.Struct("<II")


class Segment(Struct, frozen=True):
    """A piece of the guest's memory, within one region."""

    fd: int
    offset: int  # in the file
    length: int

    def read(self) -> bytes:
        data = os.pread(self.fd, self.length, self.offset)
        if len(data) != self.length:
            raise VhostUserFailed(
                f"cannot read guest memory: its file ends within {self.length} bytes at {self.offset:#x}"
            )
        return data

    def write(self, data: bytes | memoryview) -> None:
        """`data` has at most `length` bytes."""
        if os.pwrite(self.fd, data, self.offset) != len(data):
            raise VhostUserFailed(f"cannot write guest memory: no room for {len(data)} bytes at {self.offset:#x}")


class GuestMemory:
    """The regions of a guest's memory, by descriptors of our own."""

    def __init__(self, regions: Sequence[Region], descriptors: Sequence[int]) -> None:
        """Opens what `descriptors` stand for anew, one for each region; the caller keeps them.

        The front end shares the flags of a descriptor that it has sent, and could make our writes append by them. What
        it cannot write itself we do not open: we may be root.
        """
        self._regions: list[tuple[Region, int]] = []
        try:
            for region, fd in zip(regions, descriptors, strict=True):
                found = os.fstat(fd)
                if fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_PATH) != os.O_RDWR:
                    raise VhostUserFailed("cannot use guest memory: its descriptor is not for reading and writing")
                if not stat.S_ISREG(found.st_mode) or found.st_size < region.file_offset + region.size:
                    raise VhostUserFailed(
                        f"cannot use guest memory: no file of {region.size:#x} bytes stands behind it"
                    )
                own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
                self._regions.append((region, own))
        except OSError as exc:
            self.close()
            raise VhostUserFailed(f"cannot use guest memory: {exc.strerror}") from exc
        except VhostUserFailed:
            self.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        for _, fd in self._regions:
            os.close(fd)
        self._regions.clear()

    def segment(self, address: int, length: int) -> Segment:
        """`length` bytes at a guest address."""
        for region, fd in self._regions:
            start = address - region.guest_address
            if start >= 0 and start + length <= region.size:
                return Segment(fd, region.file_offset + start, length)
        raise VhostUserFailed(f"cannot use a buffer: {length} bytes at {address:#x} are not in the guest's memory")

    def ring_segment(self, address: int, length: int, alignment: int) -> Segment:
        """`length` bytes at an address of the front end's."""
        for region, fd in self._regions:
            start = address - region.user_address
            if start >= 0 and start + length <= region.size and not address % alignment:
                return Segment(fd, region.file_offset + start, length)
        raise VhostUserFailed(f"cannot use a ring: {length} bytes at {address:#x} are not in the guest's memory")


class Chain(Struct, frozen=True):
    """Buffers that belong together: `readable` by the device, then `writable`."""

    head: int
    readable: tuple[Segment, ...]
    writable: tuple[Segment, ...]


class Virtqueue:
    """One queue. Chains are taken in the order in which the driver offers them, and given back in that order."""

    def __init__(self, memory: GuestMemory, size: int, addresses: RingAddresses, base: int) -> None:
        if not 0 < size <= QUEUE_SIZE_MAX or size & (size - 1) or not 0 <= base <= 0xFFFF:
            raise VhostUserFailed(f"cannot use ring {addresses.index}: size {size}, base {base}")
        self._memory = memory
        self._size = size
        self._table = memory.ring_segment(addresses.descriptors, _DESCRIPTOR.size * size, 16)
        self._available = memory.ring_segment(addresses.available, _HEAD.size + 2 * size, 2)
        self._used = memory.ring_segment(addresses.used, _HEAD.size + _USED.size * size, 4)
        self._head = Segment(self._available.fd, self._available.offset, _HEAD.size)
        self._offered = base  # index up to which the driver is known to have offered chains
        self._taken = base  # likewise, we have taken them
        self._returned = base  # likewise, given them back
        self._kicks = True

    @property
    def returned(self) -> int:
        """Index of the first chain that was not given back, of 16 bits."""
        return self._returned

    def offered(self) -> int:
        """How many chains wait to be taken."""
        self._look()
        return (self._offered - self._taken) & 0xFFFF

    def ask_for_kicks(self, wanted: bool) -> None:
        """Whether the driver is to kick when it offers chains. What it offered before may have come without."""
        if wanted is not self._kicks:
            self._kicks = wanted
            _write(self._used.fd, struct.pack("<H", 0 if wanted else NO_NOTIFY), self._used.offset)

    def _look(self) -> int:
        """Read flags and index of the available ring; returns the flags.

        A driver that is being removed takes back what it has offered, by an index that goes back (Linux'
        virtqueue_detach_unused_buf), before a vhost-user back end hears of anything.
        """
        flags, index = _HEAD.unpack(self._head.read())
        count, in_use = (index - self._returned) & 0xFFFF, (self._taken - self._returned) & 0xFFFF
        if count > self._size and (self._offered - index) & 0xFFFF > self._size:
            raise VhostUserFailed(f"cannot use a ring of {self._size}: it offers {count} chains")
        self._offered = index if in_use < count <= self._size else self._taken
        return int(flags)

    def take(self, bytes_max: int, chains_max: int = QUEUE_SIZE_MAX, *, chain_max: int = CHAIN_MAX) -> list[Chain]:
        """Chains until they have `bytes_max` bytes together, at least one if any is offered; each has `chain_max` bytes
        at most."""
        if self._offered == self._taken:
            self._look()
        count = min((self._offered - self._taken) & 0xFFFF, chains_max)
        if not count:
            return []
        ring = self._available.read()
        table = self._table.read()
        chains: list[Chain] = []
        descriptors = 0
        for _ in range(count):
            (head,) = struct.unpack_from("<H", ring, _HEAD.size + 2 * (self._taken % self._size))
            chain, size = self._chain(table, head, chain_max)
            chains.append(chain)
            self._taken = (self._taken + 1) & 0xFFFF
            bytes_max -= size
            descriptors += len(chain.readable) + len(chain.writable)
            if descriptors > self._size:
                raise VhostUserFailed(f"cannot use a ring of {self._size}: its chains have more descriptors")
            if bytes_max <= 0:
                break
        return chains

    def _chain(self, table: bytes, head: int, chain_max: int) -> tuple[Chain, int]:
        readable: list[Segment] = []
        writable: list[Segment] = []
        size, index = 0, head
        for _ in range(self._size):
            if index >= self._size:
                raise VhostUserFailed(f"cannot use a chain: descriptor {index} of a ring of {self._size}")
            address, length, flags, following = _DESCRIPTOR.unpack_from(table, _DESCRIPTOR.size * index)
            size += length
            if flags & INDIRECT or size > chain_max:
                raise VhostUserFailed(f"cannot use a chain: flags {flags:#x}, {size} bytes, at most {chain_max}")
            segment = self._memory.segment(address, length)
            if flags & WRITE:
                writable.append(segment)
            elif writable:
                raise VhostUserFailed("cannot use a chain: what the device reads is behind what it writes")
            else:
                readable.append(segment)
            if not flags & NEXT:
                return Chain(head, tuple(readable), tuple(writable)), size
            index = following
        raise VhostUserFailed(f"cannot use a chain: it has more than the {self._size} descriptors of its ring")

    def give_back(self, chains: Sequence[tuple[int, int]]) -> bool:
        """Return chains: head, and how many bytes were written. Says whether the driver wants to hear of it.

        The index is written before the driver's flags are read: each system call takes a reference to a page, which
        is a full memory barrier.
        """
        first = self._returned % self._size
        content = b"".join(_USED.pack(head, written) for head, written in chains)
        room = (self._size - first) * _USED.size
        at = self._used.offset + _HEAD.size
        _write(self._used.fd, content[:room], at + first * _USED.size)
        if len(content) > room:
            _write(self._used.fd, content[room:], at)
        self._returned = (self._returned + len(chains)) & 0xFFFF
        _write(self._used.fd, struct.pack("<H", self._returned), self._used.offset + 2)
        return not self._look() & NO_INTERRUPT


def _write(fd: int, data: bytes, offset: int) -> None:
    if os.pwrite(fd, data, offset) != len(data):
        raise VhostUserFailed(f"cannot write guest memory: no room for {len(data)} bytes at {offset:#x}")
