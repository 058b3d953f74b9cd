"""Kernel modules on their way into the guest: unpacked, and without their signature."""

import gzip
import lzma
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from katapod.osbuilder.errors import OsbuilderError
from katapod.osbuilder.stage import pack_module, read_module, without_signature


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
