"""What an ELF file says that it may load by dlopen(3)."""

import json
import struct
from pathlib import Path

import pytest

from katapod.osbuilder.shared_libraries import dlopen_notes, loaded_later

KMOD = {"feature": "kmod", "priority": "recommended", "soname": ["libkmod.so.3", "libkmod.so.2"]}
TPM = {"feature": "tpm", "priority": "suggested", "soname": ["libtss2-esys.so.0"]}
BLKID = {"feature": "blkid", "soname": ["libblkid.so.1"]}  # recommended, if nothing is said


def elf_with(*descriptions: bytes, owner: bytes = b"FDO\0", kind: int = 0x407C0C0A) -> bytes:
    """A file of a header, one section of notes, and the table of sections."""
    notes = b""
    for text in descriptions:
        notes += struct.pack("<III", len(owner), len(text), kind) + owner + text + bytes(-len(text) % 4)
    header = (
        b"\x7fELF\x02\x01" + bytes(34) + struct.pack("<Q", 64 + len(notes)) + bytes(10) + struct.pack("<HHH", 64, 1, 0)
    )
    return header + notes + struct.pack("<IIQQQQIIQQ", 0, 7, 0, 0, 64, len(notes), 0, 0, 4, 0)


def said(*entries: object) -> bytes:
    return json.dumps(entries).encode() + b"\0"


def test_what_is_needed_or_recommended_counts() -> None:
    elf = elf_with(said(KMOD), said(TPM), said({**TPM, "priority": "required"}, BLKID))
    assert dlopen_notes(elf) == [("libkmod.so.3", "libkmod.so.2"), ("libtss2-esys.so.0",), ("libblkid.so.1",)]


@pytest.mark.parametrize(
    "elf",
    [
        b"",
        b"#!/bin/sh\n",
        elf_with(said(KMOD), owner=b"GNU\0"),
        elf_with(said(KMOD), kind=1),
        elf_with(b"no json"),
        elf_with(b"{}"),
        elf_with(said("a string")),
        elf_with(said({**KMOD, "soname": []}))[:70],
    ],
)
def test_anything_else_says_nothing(elf: bytes) -> None:
    assert dlopen_notes(elf) == []


def test_a_name_is_no_path() -> None:
    assert dlopen_notes(elf_with(said({**KMOD, "soname": ["../../x.so", "libkmod.so.2"]}))) == [("libkmod.so.2",)]


async def test_what_systemd_loads_later_is_found(tmp_path: Path) -> None:
    """systemd of Debian 13 loads libkmod so; that of Debian 12 is linked with it."""
    systemd = Path("/usr/lib/systemd/systemd")
    if not systemd.exists():
        pytest.skip("needs systemd")
    names = [path.name for path in await loaded_later([systemd])]
    assert names == [] or "libkmod.so.2" in names
    assert len(names) == len(set(names))
