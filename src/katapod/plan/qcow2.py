"""An empty qcow2 image: the overlay that a container writes to, over a disk that it shares with others.

It is laid out here, because a start would wait longer for a program that does it than for all else about the
disk. Source: QEMU's docs/interop/qcow2.txt, version 3.
"""

import struct

from msgspec import Struct

__all__ = ["CLUSTER_BYTES", "Qcow2Plan", "plan_empty_overlay"]

CLUSTER_BITS = 16  # QEMU's default. Larger ones copy more for each small write, smaller ones need more tables
CLUSTER_BYTES = 1 << CLUSTER_BITS

_ENTRIES = CLUSTER_BYTES // 8  # of an L2 table: one cluster, 8 bytes an entry
_REFCOUNT_ORDER = 4  # 16 bits a cluster
_HEADER_BYTES = 104
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")


class Qcow2Plan(Struct, frozen=True):
    """A file of `length_bytes` that is zero except for `pieces`: offset and content."""

    length_bytes: int
    pieces: tuple[tuple[int, bytes], ...]

    def describe(self) -> str:
        shown = ", ".join(f"{len(data)} at {offset}" for offset, data in self.pieces)
        return f"qcow2 overlay of {self.length_bytes} bytes: {shown}"


def plan_empty_overlay(disk_bytes: int) -> Qcow2Plan:
    """Plan an overlay over a disk of `disk_bytes`. It names no backing file: whoever opens it says which.

    Clusters in order: header, refcount table, refcount block, L1 table. No L2 table exists yet.
    """
    l1_entries = -(-disk_bytes // (_ENTRIES * CLUSTER_BYTES))
    l1_clusters = -(-l1_entries * 8 // CLUSTER_BYTES)
    used = 3 + l1_clusters
    header = _HEADER.pack(
        *(b"QFI\xfb", 3),
        *(0, 0),  # backing file's name: offset, length
        *(CLUSTER_BITS, disk_bytes),
        0,  # no encryption
        *(l1_entries, 3 * CLUSTER_BYTES),
        *(CLUSTER_BYTES, 1),  # refcount table: offset, clusters
        *(0, 0),  # snapshots: number, offset
        *(0, 0, 0),  # features: incompatible, compatible, autoclear
        *(_REFCOUNT_ORDER, _HEADER_BYTES),
    )
    pieces = (
        (0, header),
        (CLUSTER_BYTES, struct.pack(">Q", 2 * CLUSTER_BYTES)),
        (2 * CLUSTER_BYTES, struct.pack(">H", 1) * used),
    )
    return Qcow2Plan(used * CLUSTER_BYTES, pieces)
