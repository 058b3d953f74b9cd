"""Taking the ELF kernel out of a bzImage: formats, notes, broken files."""

import bz2
import gzip
import lzma
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from katapod.osbuilder.errors import KernelUnusable
from katapod.osbuilder.vmlinux import extract_vmlinux, has_pvh_entry, trim_elf


def make_elf(*, owner: bytes = b"Xen\0", kind: int = 0x12, body: bytes = b"kernel code") -> bytes:
    """A little ELF64 file: one LOAD segment, one NOTE segment, then bytes that no segment covers."""
    note = struct.pack("<III", len(owner), 4, kind) + owner + struct.pack("<I", 0x1000000)
    first = struct.pack("<III", 4, 3, 6) + b"Xen\0" + b"abc\0"  # a padded note before it
    notes = first + note
    start = 64 + 2 * 56
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x1000000, 64, 9999, 0, 64, 56, 2, 64, 7, 6)
    load = struct.pack("<IIQQQQQQ", 1, 5, start, 0, 0, len(body) + len(notes), len(body) + len(notes), 4096)
    noted = struct.pack("<IIQQQQQQ", 4, 4, start + len(body), 0, 0, len(notes), len(notes), 4)
    return header + load + noted + body + notes + b"relocations and section names"


def make_bzimage(payload: bytes, *, protocol: int = 0x20F) -> bytes:
    image = bytearray(5 * 512)
    image[0x1F1] = 4
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, protocol)
    struct.pack_into("<II", image, 0x248, 64, len(payload))
    return bytes(image) + bytes(64) + payload + b"signature"


def by_program(*argv: str) -> Callable[[bytes], bytes]:
    def pack(data: bytes) -> bytes:
        if shutil.which(argv[0]) is None:
            pytest.skip(f"{argv[0]} is not installed")
        return subprocess.run(argv, input=data, capture_output=True, check=True).stdout

    return pack


def with_size(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda data: pack(data) + struct.pack("<I", len(data))


@pytest.mark.parametrize(
    "pack",
    [
        pytest.param(gzip.compress, id="gzip"),
        pytest.param(with_size(lzma.compress), id="xz"),
        pytest.param(with_size(lambda data: lzma.compress(data, lzma.FORMAT_ALONE)), id="lzma"),
        pytest.param(with_size(bz2.compress), id="bzip2"),
        pytest.param(with_size(by_program("lz4", "-lc")), id="lz4"),
        pytest.param(with_size(by_program("zstd", "-qc")), id="zstd"),
        pytest.param(with_size(by_program("lzop", "-c")), id="lzo"),
    ],
)
def test_every_compression_of_the_kernel_build_is_read(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    elf = make_elf()
    image = tmp_path / "vmlinuz"
    image.write_bytes(make_bzimage(pack(elf)))

    found = extract_vmlinux(image)

    assert found == trim_elf(elf, image)
    assert b"kernel code" in found
    assert b"relocations" not in found
    assert struct.unpack_from("<HHH", found, 0x3A) == (0, 0, 0)


def test_an_elf_kernel_is_taken_as_it_is(tmp_path: Path) -> None:
    image = tmp_path / "vmlinux-1"
    image.write_bytes(make_elf())

    assert extract_vmlinux(image).startswith(b"\x7fELF")


@pytest.mark.parametrize(("owner", "kind"), [(b"GNU\0", 0x12), (b"Xen\0", 0x11)])
def test_a_kernel_without_the_pvh_note_is_refused(tmp_path: Path, owner: bytes, kind: int) -> None:
    image = tmp_path / "vmlinuz"
    image.write_bytes(make_bzimage(gzip.compress(make_elf(owner=owner, kind=kind))))

    assert not has_pvh_entry(make_elf(owner=owner, kind=kind), image)
    with pytest.raises(KernelUnusable, match="no PVH entry point"):
        extract_vmlinux(image)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        pytest.param(make_bzimage(gzip.compress(make_elf()))[:2700], "it is truncated", id="truncated"),
        pytest.param(make_bzimage(gzip.compress(make_elf()), protocol=0x207), "boot protocol 2.07", id="old"),
        pytest.param(make_bzimage(b"????" * 9), "unknown compression", id="unknown"),
        pytest.param(make_bzimage(b"\x1f\x8b" + bytes(40)), "cannot unpack", id="broken gzip"),
        pytest.param(make_bzimage(gzip.compress(b"no kernel")), "not a 64-bit ELF", id="no ELF"),
        pytest.param(b"MZ" + bytes(4000), "neither a bzImage nor an ELF", id="no bzImage"),
        pytest.param(b"", "neither a bzImage nor an ELF", id="empty"),
        pytest.param(make_elf()[:150], "ELF", id="truncated ELF"),
    ],
)
def test_a_broken_kernel_file_is_named_with_its_cause(tmp_path: Path, content: bytes, cause: str) -> None:
    image = tmp_path / "vmlinuz-9.9"
    image.write_bytes(content)

    with pytest.raises(KernelUnusable, match=cause) as caught:
        extract_vmlinux(image)
    assert str(image) in str(caught.value)
    assert "\n" not in str(caught.value)
