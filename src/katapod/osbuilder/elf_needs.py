"""Remove a needed shared library (DT_NEEDED) from an ELF file.

Distributions link for every use case; the guest has one. crun is linked with libsystemd (and so with libgcrypt,
liblzma, ...) to talk to systemd, which is not in the guest; protobuf's C core needs libstdc++ by name only. Loading
them takes longer than crun itself at each start. docs/adr/0004-guest-image.md.

The library's symbols become weak: the loader sets them to 0, so that a call fails with SIGSEGV and never gives a wrong
result. Sources: elf(5), System V ABI (dynamic section), LSB (symbol versions).
"""

import struct

from msgspec import Struct

__all__ = ["ElfFormatError", "drop_needed"]

_PT_LOAD, _PT_DYNAMIC = 1, 2
_SHT_DYNSYM = 11
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_SYMTAB = 0, 1, 5, 6
_DT_VERSYM, _DT_VERNEED, _DT_VERNEEDNUM = 0x6FFFFFF0, 0x6FFFFFFE, 0x6FFFFFFF
_STB_WEAK = 2
_VER_NDX_GLOBAL = 1


class ElfFormatError(ValueError):
    """Not an ELF file that we know how to change; use it as it is."""


class _Dynamic(Struct):
    offset: int
    entries: list[tuple[int, int]]

    def value(self, tag: int) -> int | None:
        return next((value for known, value in self.entries if known == tag), None)


def drop_needed(elf: bytes, library: str, *, only_unused: bool = False) -> bytes:
    """Return `elf` without the needed `library` (a soname); unchanged if it does not need it.

    `only_unused`: also unchanged if it uses any versioned symbol of the library. Raises ElfFormatError if `elf`
    is not a dynamically linked 64-bit little-endian ELF file with section headers.
    """
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ElfFormatError("not a 64-bit little-endian ELF file")
    data = bytearray(elf)
    try:
        dynamic = _read_dynamic(data)
        strings = _file_offset(data, dynamic.value(_DT_STRTAB) or 0)
        needed = [
            entry
            for entry in dynamic.entries
            if entry[0] == _DT_NEEDED and _string(data, strings + entry[1]) == library
        ]
        if not needed:
            return elf
        dynamic.entries.remove(needed[0])
        indices = _drop_versions(data, dynamic, strings, library)
        if indices and only_unused:
            return elf
        _weaken(data, dynamic, indices)
        for index, (tag, value) in enumerate([*dynamic.entries, (_DT_NULL, 0)]):
            struct.pack_into("<QQ", data, dynamic.offset + 16 * index, tag, value)
    except (struct.error, IndexError) as exc:
        raise ElfFormatError(str(exc)) from exc
    return bytes(data)


def _program_headers(data: bytearray) -> list[tuple[int, ...]]:
    (offset,) = struct.unpack_from("<Q", data, 0x20)
    size, count = struct.unpack_from("<HH", data, 0x36)
    return [struct.unpack_from("<IIQQQQQQ", data, offset + index * size) for index in range(count)]


def _file_offset(data: bytearray, address: int) -> int:
    for kind, _, offset, virtual, _, size, _, _ in _program_headers(data):
        if kind == _PT_LOAD and virtual <= address < virtual + size:
            return offset + address - virtual
    raise ElfFormatError(f"address {address:#x} is in no segment")


def _string(data: bytearray, offset: int) -> str:
    return data[offset : data.index(b"\0", offset)].decode("ascii", errors="replace")


def _read_dynamic(data: bytearray) -> _Dynamic:
    for kind, _, offset, _, _, size, _, _ in _program_headers(data):
        if kind == _PT_DYNAMIC:
            entries = [struct.unpack_from("<QQ", data, offset + at) for at in range(0, size, 16)]
            end = next(index for index, entry in enumerate(entries) if entry[0] == _DT_NULL)
            return _Dynamic(offset, [(tag, value) for tag, value in entries[:end]])
    raise ElfFormatError("not dynamically linked")


def _drop_versions(data: bytearray, dynamic: _Dynamic, strings: int, library: str) -> set[int]:
    """Unlink the library's entry of the list of needed versions; return the indices of its versions."""
    start, count = dynamic.value(_DT_VERNEED), dynamic.value(_DT_VERNEEDNUM)
    if start is None or not count:
        return set()
    at, former = _file_offset(data, start), None
    for _ in range(count):
        _, aux_count, file, aux, step = struct.unpack_from("<HHIII", data, at)
        if _string(data, strings + file) != library:
            former, at = at, at + step
            continue
        indices = set()
        position = at + aux
        for _ in range(aux_count):
            _, _, other, _, next_aux = struct.unpack_from("<IHHII", data, position)
            indices.add(other)
            position += next_aux
        if former is not None:
            (before,) = struct.unpack_from("<I", data, former + 12)
            struct.pack_into("<I", data, former + 12, before + step if step else 0)
        replaced = {_DT_VERNEEDNUM: count - 1}
        if former is None:
            replaced[_DT_VERNEED] = start + step
        if count == 1:
            dynamic.entries = [e for e in dynamic.entries if e[0] not in (_DT_VERNEED, _DT_VERNEEDNUM)]
        else:
            dynamic.entries = [(tag, replaced.get(tag, value)) for tag, value in dynamic.entries]
        return indices
    return set()


def _weaken(data: bytearray, dynamic: _Dynamic, indices: set[int]) -> None:
    versions, symbols = dynamic.value(_DT_VERSYM), dynamic.value(_DT_SYMTAB)
    if not indices or versions is None or symbols is None:
        return
    version_at, symbol_at = _file_offset(data, versions), _file_offset(data, symbols)
    for index in range(_symbol_count(data)):
        (version,) = struct.unpack_from("<H", data, version_at + 2 * index)
        if version & 0x7FFF in indices:
            struct.pack_into("<H", data, version_at + 2 * index, _VER_NDX_GLOBAL)
            info = data[symbol_at + 24 * index + 4]
            data[symbol_at + 24 * index + 4] = _STB_WEAK << 4 | info & 0xF


def _symbol_count(data: bytearray) -> int:
    (offset,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    for index in range(count):
        kind, length = struct.unpack_from("<4xI24xQ", data, offset + index * size)
        if kind == _SHT_DYNSYM:
            return int(length) // 24
    raise ElfFormatError("no section headers")
