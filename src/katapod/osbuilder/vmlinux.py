"""The uncompressed kernel inside a bzImage, for QEMU's direct (PVH) boot.

Sources: linux Documentation/arch/x86/boot.rst (setup header), elf(5), Xen's public/elfnote.h.
"""

import bz2
import gzip
import lzma
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from katapod.osbuilder.errors import KernelUnusable, NoDirectBoot

__all__ = ["extract_vmlinux", "has_pvh_entry", "trim_elf"]

XEN_ELFNOTE_PHYS32_ENTRY = 0x12
KERNEL_MAX = 512 * 1024 * 1024  # bytes; a kernel is some 50 MB
DECOMPRESS_LIMIT_S = 120.0

_PT_LOAD, _PT_NOTE = 1, 4
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")


def extract_vmlinux(image: Path) -> bytes:
    """The ELF kernel in `image`, trimmed, with a PVH entry point, which QEMU boots without a boot loader.

    Raises NoDirectBoot if there is no such kernel in it, KernelUnusable if the file is broken; the messages have one
    line.
    """
    data = image.read_bytes()
    elf = data if data[:4] == b"\x7fELF" else _decompress(_payload(data, image), image)
    if elf[:6] != b"\x7fELF\x02\x01":
        raise NoDirectBoot(f"cannot boot {image} directly: its payload is not a 64-bit ELF file")
    if not has_pvh_entry(elf, image):
        raise NoDirectBoot(f"cannot boot {image} directly: the kernel has no PVH entry point (CONFIG_PVH)")
    return trim_elf(elf, image)


def _payload(data: bytes, image: Path) -> bytes:
    """The compressed kernel. The header's payload fields exist since boot protocol 2.08."""
    if len(data) < 0x250 or data[0x202:0x206] != b"HdrS":
        raise KernelUnusable(f"cannot read kernel {image}: it is neither a bzImage nor an ELF file")
    (protocol,) = struct.unpack_from("<H", data, 0x206)
    if protocol < 0x208:
        raise NoDirectBoot(f"cannot read kernel {image}: boot protocol {protocol >> 8}.{protocol & 0xFF:02}")
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = ((data[0x1F1] or 4) + 1) * 512 + offset
    if start + length > len(data):
        raise KernelUnusable(
            f"cannot read kernel {image}: it is truncated ({len(data)} of at least {start + length} bytes)",
            hint="reinstall the kernel's package",
        )
    return data[start : start + length]


def _decompress(payload: bytes, image: Path) -> bytes:
    # The kernel's build appends the uncompressed size, 4 bytes, to every format but gzip, which has it anyway.
    try:
        if payload.startswith(b"\x1f\x8b"):
            return gzip.decompress(payload)
        if payload.startswith(b"\xfd7zXZ\0"):
            return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload, KERNEL_MAX)
        if payload.startswith(b"BZh"):
            return bz2.BZ2Decompressor().decompress(payload, KERNEL_MAX)
        if payload.startswith(b"\x5d\0\0"):
            return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(payload, KERNEL_MAX)
    except (OSError, EOFError, lzma.LZMAError) as exc:
        raise KernelUnusable(f"cannot unpack kernel {image}: {exc}") from exc
    for magic, program in (
        (b"\x02\x21\x4c\x18", "lz4"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x89LZO\0", "lzop"),
    ):
        if payload.startswith(magic):
            return _decompress_by(program, payload[:-4], image)
    raise NoDirectBoot(f"cannot unpack kernel {image}: unknown compression (starts with {payload[:4].hex()})")


def _decompress_by(program: str, payload: bytes, image: Path) -> bytes:
    """Runs in a thread, hence the plain subprocess."""
    path = shutil.which(program)
    if path is None:
        raise NoDirectBoot(
            f"cannot unpack kernel {image}: {program} is not installed",
            hint=f"install the package {program}: apt-get install {program}",
        )
    try:
        done = subprocess.run(
            [path, "-dc"], input=payload, capture_output=True, timeout=DECOMPRESS_LIMIT_S, check=False, env={}
        )
    except subprocess.TimeoutExpired as exc:
        raise KernelUnusable(f"cannot unpack kernel {image}: {program} timed out") from exc
    if done.returncode != 0:
        message = done.stderr.decode(errors="replace").strip()
        raise KernelUnusable(f"cannot unpack kernel {image}: {program}: {message}")
    return done.stdout


def _program_headers(elf: bytes, image: Path) -> list[tuple[int, ...]]:
    try:
        offset, size, count = (
            struct.unpack_from("<Q", elf, 0x20)[0],
            *struct.unpack_from("<HH", elf, 0x36),
        )
        headers = [_PROGRAM_HEADER.unpack_from(elf, offset + index * size) for index in range(count)]
    except struct.error as exc:
        raise KernelUnusable(f"cannot read kernel {image}: broken ELF program headers") from exc
    for header in headers:
        if header[2] + header[5] > len(elf):
            raise KernelUnusable(f"cannot read kernel {image}: a segment of the ELF file is truncated")
    return headers


def _notes(data: bytes) -> Iterator[tuple[bytes, int]]:
    position = 0
    while position + 12 <= len(data):
        name_size, value_size, kind = struct.unpack_from("<III", data, position)
        yield data[position + 12 : position + 12 + name_size].rstrip(b"\0"), kind
        position += 12 + (name_size + 3 & ~3) + (value_size + 3 & ~3)


def has_pvh_entry(elf: bytes, image: Path) -> bool:
    """Whether a note segment names a 32-bit physical entry point, which is what QEMU looks for."""
    return any(
        (owner, kind) == (b"Xen", XEN_ELFNOTE_PHYS32_ENTRY)
        for header in _program_headers(elf, image)
        if header[0] == _PT_NOTE
        for owner, kind in _notes(elf[header[2] : header[2] + header[5]])
    )


def trim_elf(elf: bytes, image: Path) -> bytes:
    """Keep what a loader reads: headers and segments. Drops sections, symbols and what is appended: the bzImage's
    relocations, which only its own decompressor uses."""
    end = max(header[2] + header[5] for header in _program_headers(elf, image) if header[0] == _PT_LOAD)
    trimmed = bytearray(elf[:end])
    struct.pack_into("<Q", trimmed, 0x28, 0)  # e_shoff
    struct.pack_into("<HHH", trimmed, 0x3A, 0, 0, 0)  # e_shentsize, e_shnum, e_shstrndx
    return bytes(trimmed)
