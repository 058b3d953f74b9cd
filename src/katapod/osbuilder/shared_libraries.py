"""The shared libraries of programs: those loaded at the start, and those loaded by dlopen(3) according to ELF notes."""

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from katapod.host.guest_kernel import library_names

__all__ = ["dlopen_notes", "loaded_later", "shared_libraries"]

_SHT_NOTE = 7
_NOTE_DLOPEN = 0x407C0C0A
"""Source: ELF_DLOPEN_METADATA, a specification of the UAPI group."""
_TAKEN = ("required", "recommended")  # priorities; the guest goes without what is only suggested


async def shared_libraries(binaries: Iterable[Path]) -> list[Path]:
    """What ldd(1) resolves, as real paths."""
    return [Path(path).resolve() for path in await library_names(binaries)]


async def loaded_later(programs: Iterable[Path]) -> list[Path]:
    """The libraries that `programs` and their libraries dlopen(3), as far as they are installed and not loaded anyway.

    systemd 257 loads libkmod so: without it no kernel module is loaded. Paths are those of the soname links.
    """
    found: list[Path] = []
    asked = list(programs)
    while asked:
        loaded = await shared_libraries(asked)
        directories = sorted({path.parent for path in loaded})
        wanted = [names for path in (*asked, *loaded) for names in dlopen_notes(path.read_bytes())]
        asked = []
        for names in wanted:
            here = [directory / name for name in names for directory in directories if (directory / name).exists()]
            if here and here[0].resolve() not in loaded and here[0] not in (*found, *asked):
                asked.append(here[0])
        found += asked
    return found


def dlopen_notes(elf: bytes) -> list[tuple[str, ...]]:
    """The sonames, in order of preference, of each library that an ELF file may dlopen; () if it is not an ELF file."""
    found = []
    for note in _notes(elf):
        try:
            entries = json.loads(note.rstrip(b"\0"))
        except ValueError:
            continue
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict) and entry.get("priority", "recommended") in _TAKEN:
                found.append(
                    tuple(name for name in entry.get("soname", ()) if isinstance(name, str) and "/" not in name)
                )
    return found


def _notes(elf: bytes) -> Iterator[bytes]:
    """Descriptors of the notes of that type. Source: elf(5), 64-bit little-endian files."""
    if elf[:6] != b"\x7fELF\x02\x01":
        return
    try:
        (table,) = struct.unpack_from("<Q", elf, 0x28)
        size, count = struct.unpack_from("<HH", elf, 0x3A)
        for number in range(count):
            _, kind, _, _, offset, length = struct.unpack_from("<IIQQQQ", elf, table + number * size)
            end = offset + length
            while kind == _SHT_NOTE and offset + 12 <= end:
                name_size, text_size, note = struct.unpack_from("<III", elf, offset)
                text = offset + 12 + (name_size + 3 & ~3)
                if note == _NOTE_DLOPEN and elf[offset + 12 : offset + 16] == b"FDO\0":
                    yield elf[text : text + text_size]
                offset = text + (text_size + 3 & ~3)
    except struct.error:
        return  # truncated: return what was found
