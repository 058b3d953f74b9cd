"""Kernel modules on their way into the guest: unpacked, without signature and debugging information."""

import gzip
import lzma
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from katapod.osbuilder.errors import OsbuilderError
from katapod.osbuilder.module_file import pack_module, read_module, without_debug, without_signature


def test_an_appended_signature_is_cut_off() -> None:
    module, signature = b"\x7fELF module", b"s" * 77
    info = struct.pack(">BBBBB3xI", 0, 0, 2, 0, 0, len(signature))

    assert without_signature(module + signature + info + b"~Module signature appended~\n") == module
    assert without_signature(module) == module


def test_compressed_modules_are_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.ko").write_bytes(b"module")
    (tmp_path / "b.ko.gz").write_bytes(gzip.compress(b"module"))
    (tmp_path / "c.ko.xz").write_bytes(lzma.compress(b"module", check=lzma.CHECK_CRC32))

    assert {read_module(path) for path in tmp_path.iterdir()} == {b"module"}


def test_what_is_packed_for_the_guest_is_the_same_module_and_the_same_each_time(tmp_path: Path) -> None:
    module = b"\x7fELF module" * 100
    path = tmp_path / "a.ko.xz"
    path.write_bytes(pack_module(module))

    assert read_module(path) == module
    assert pack_module(module) == path.read_bytes()
    assert len(path.read_bytes()) < len(module)


def test_zstd_modules_are_unpacked(tmp_path: Path) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("zstd is not installed")
    path = tmp_path / "a.ko.zst"
    path.write_bytes(subprocess.run(["zstd", "-qc"], input=b"module", capture_output=True, check=True).stdout)

    assert read_module(path) == b"module"


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_broken_module_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"virtio.ko{suffix}"
    path.write_bytes(b"garbage")

    with pytest.raises(OsbuilderError, match=r"cannot unpack kernel module .*virtio\.ko"):
        read_module(path)


needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, to make an object file")


def compiled(tmp_path: Path) -> bytes:
    source, module = tmp_path / "m.c", tmp_path / "m.o"
    source.write_text("int twice(int x) { return 2 * x; }\nint (*pointer)(int) = twice;\n")
    subprocess.run(["gcc", "-g", "-c", "-o", str(module), str(source)], check=True)
    return module.read_bytes()


@needs_compiler
def test_debugging_information_goes_and_the_code_stays(tmp_path: Path) -> None:
    module = compiled(tmp_path)

    slim = without_debug(module)

    assert len(slim) < len(module) * 3 // 4
    assert b"GNU C1" not in slim  # of .debug_str: DW_AT_producer
    before, after = tmp_path / "m.o", tmp_path / "slim.o"
    after.write_bytes(slim)
    for what in ("-s", "-r", "-p .data"):  # symbols, relocations, content
        assert readelf(what, after) == readelf(what, before)
    assert without_debug(slim) == slim


def readelf(what: str, path: Path) -> str:
    done = subprocess.run(["readelf", "-W", *what.split(), str(path)], capture_output=True, text=True, check=True)
    tables = re.split(r"\n(?=Relocation section)", done.stdout)
    return "\n".join(re.sub(r"at offset \w+ ", "", table) for table in tables if ".rela.debug_" not in table).strip()


@needs_compiler
def test_a_program_that_is_linked_from_it_works(tmp_path: Path) -> None:
    (tmp_path / "slim.o").write_bytes(without_debug(compiled(tmp_path)))
    (tmp_path / "main.c").write_text("extern int (*pointer)(int); int main(void) { return pointer(21); }\n")
    subprocess.run(
        ["gcc", "-o", str(tmp_path / "main"), str(tmp_path / "main.c"), str(tmp_path / "slim.o")], check=True
    )

    assert subprocess.run([str(tmp_path / "main")], check=False).returncode == 42


@needs_compiler
@pytest.mark.parametrize("cut", [10, 70, 400])
def test_what_is_broken_stays_as_it_is(tmp_path: Path, cut: int) -> None:
    module = compiled(tmp_path)

    assert without_debug(module[:cut]) == module[:cut]
    assert without_debug(module[:-cut]) == module[:-cut]
    assert without_debug(b"#!/bin/sh\n" * 20) == b"#!/bin/sh\n" * 20
