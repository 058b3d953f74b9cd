"""Kernel module files: read as the distribution packs them, without what the guest does not need, packed again."""

import gzip
import lzma
import struct
import subprocess
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from katapod.host.process import find_program
from katapod.osbuilder.errors import OsbuilderError

__all__ = ["pack_module", "read_module", "slim_module", "without_debug", "without_signature"]

_SIGNATURE_MAGIC = b"~Module signature appended~\n"
_HEADER = struct.Struct("<IIQQQQIIQQ")  # Elf64_Shdr
_SHT_NOBITS, _SHF_ALLOC = 8, 2
_DEBUG = (b".debug_", b".rela.debug_")


def read_module(path: Path) -> bytes:
    """The content of a module file, decompressed: the agent passes it to finit_module as it is."""
    data = path.read_bytes()
    try:
        if path.suffix == ".gz":
            return gzip.decompress(data)
        if path.suffix == ".xz":
            return lzma.decompress(data)
    except (OSError, EOFError, lzma.LZMAError) as exc:
        raise OsbuilderError(f"cannot unpack kernel module {path}: {exc}") from exc
    if path.suffix == ".zst":
        return _unpack_zstd(path)
    return data


def _unpack_zstd(path: Path) -> bytes:
    done = subprocess.run(
        [find_program("zstd", package="zstd"), "-dcq", str(path)], capture_output=True, check=False, timeout=60
    )
    if done.returncode != 0:
        raise OsbuilderError(f"cannot unpack kernel module {path}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def without_signature(module: bytes) -> bytes:
    """Remove an appended signature: checking it costs the guest an RSA operation per module, and the initrd that holds
    both module and kernel has to be trusted anyway. docs/adr/0004-guest-image.md. Layout: linux
    include/linux/module_signature.h: data, signature, 12 bytes that end in its length, magic."""
    if not module.endswith(_SIGNATURE_MAGIC):
        return module
    body = module[: -len(_SIGNATURE_MAGIC)]
    (length,) = struct.unpack_from(">I", body, len(body) - 4)
    return body[: len(body) - 12 - length]


def pack_module(module: bytes) -> bytes:
    """Compressed by xz, with a check and a dictionary size that all readers support: busybox, libkmod, the kernel."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 20}]
    return lzma.compress(module, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters)


def slim_module(module: bytes) -> bytes:
    return without_debug(without_signature(module))


class _Section(Struct, frozen=True):
    """Elf64_Shdr, as far as it matters here; the rest of it is kept as it is."""

    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    rest: tuple[int, ...]  # link, info
    align: int
    entry_size: int

    def pack(self) -> bytes:
        fields = (self.name, self.kind, self.flags, self.address, self.offset, self.size, *self.rest)
        return _HEADER.pack(*fields, self.align, self.entry_size)


def without_debug(module: bytes) -> bytes:
    """Empty the sections with debugging information and close the gaps. Of User-mode Linux they are most of a module.

    Sections keep their numbers, which symbols and relocations refer to: the kernel takes no notice of relocations of
    sections that it does not load. What is no relocatable 64-bit ELF file stays as it is. Source: elf(5).
    """
    try:
        return _close_gaps(module)
    except (struct.error, IndexError):
        return module


def _close_gaps(module: bytes) -> bytes:
    if module[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", module, 16) != (1,):
        return module
    (table,) = struct.unpack_from("<Q", module, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", module, 0x3A)
    if entry_size != _HEADER.size or not 0 < names_index < count:  # more sections than a module ever has
        return module
    sections = []
    for number in range(count):
        *fields, link, info, align, size = _HEADER.unpack_from(module, table + number * entry_size)
        sections.append(_Section(*(*fields, (link, info), align, size)))
    names_at = sections[names_index].offset

    def is_debug(section: _Section) -> bool:
        name = module[names_at + section.name : names_at + section.name + 12]
        return name.startswith(_DEBUG) and not section.flags & _SHF_ALLOC

    if not any(is_debug(section) and section.size for section in sections):
        return module
    result = bytearray(module[:0x40])
    moved: dict[int, _Section] = {}
    for number, section in sorted(enumerate(sections), key=lambda item: item[1].offset):
        size = 0 if is_debug(section) else section.size
        if number and section.kind != _SHT_NOBITS:
            result += bytes(-len(result) % max(section.align, 1)) if size else b""
            content = module[section.offset : section.offset + size]
            if len(content) < size:
                return module  # truncated
            section = replace(section, offset=len(result), size=size)
            result += content
        elif number:
            section = replace(section, offset=len(result))
        moved[number] = section
    result += bytes(-len(result) % 8)
    struct.pack_into("<Q", result, 0x28, len(result))
    for number in range(count):
        result += moved[number].pack()
    return bytes(result)
