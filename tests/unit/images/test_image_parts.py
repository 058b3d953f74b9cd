"""The pure or file-only parts of the image room."""

import asyncio
import os
import struct
from pathlib import Path

import pytest

import katapod.images
from katapod.images import Access, BrokenImage, ImageError, ImageStore, StoreDamaged
from katapod.images.busybox import check_static
from katapod.images.files import NameEntry, StoreFiles
from katapod.images.source import parse_manifest, skopeo_environment
from katapod.images.transfer import measure_tree, scan_disk_bytes
from katapod.model.image import ImageParseError, SkopeoReference, parse_image_ref
from katapod.tasks import finish

DIGEST = "sha256:" + "0a" * 32


def _docker(text: str) -> SkopeoReference:
    reference = parse_image_ref(text)
    assert isinstance(reference, SkopeoReference)
    return reference


@pytest.mark.parametrize(
    ("registry", "verify"),
    [
        ("127.0.0.1:5000", "false"),
        ("localhost", "false"),
        ("localhost:80", "false"),
        ("[::1]:80", "false"),
        ("registry.example", "true"),
        ("localhost.example:80", "true"),
        ("192.0.2.1:5000", "true"),
    ],
)
def test_tls_is_verified_but_on_loopback(registry: str, verify: str) -> None:
    reference = _docker(f"docker://{registry}/app")
    assert Access().flags(reference) == [f"--tls-verify={verify}"]
    assert Access(tls_verify=True).flags(reference, prefix="src-") == ["--src-tls-verify=true"]
    assert Access(tls_verify=False, authfile=Path("/a")).flags(reference)[1:] == ["--authfile=/a"]
    assert Access(authfile=Path("/a")).flags(_docker("oci:/x")) == []


def test_only_what_skopeo_needs_is_passed_on() -> None:
    environ = {"HTTPS_PROXY": "p", "no_proxy": "n", "REGISTRY_AUTH_FILE": "f", "SECRET": "s", "LD_PRELOAD": "l"}
    assert skopeo_environment(environ) == {"HTTPS_PROXY": "p", "no_proxy": "n", "REGISTRY_AUTH_FILE": "f"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"layers": [{"digest": "sha256:../../etc/passwd"}]}',
        b'{"config": {"digest": "md5:0"}}',
        b'{"layers": [{"digest": 5}]}',
        b" " * (5 << 20),
    ],
)
def test_hostile_manifests_are_refused(data: bytes) -> None:
    with pytest.raises(BrokenImage, match="cannot read the image manifest"):
        parse_manifest(data)


def test_damaged_names_file_is_said(tmp_path: Path) -> None:
    files = StoreFiles(tmp_path)
    assert files.read_names() == {}
    for text in ("", "{", '{"names": {}, "extra": 1}', '{"names": []}'):
        (tmp_path / "names.json").write_text(text)
        with pytest.raises(StoreDamaged, match=r"names\.json") as caught:
            files.read_names()
        assert caught.value.hint


async def test_names_survive_and_no_temporary_file_stays(tmp_path: Path) -> None:
    files = StoreFiles(tmp_path / "store")
    names = {"b:1": NameEntry(DIGEST, "oci:/x"), "a:1": NameEntry(DIGEST, "docker://a:1", DIGEST, "s")}
    async with files.locked():
        files.write_names(names)
    assert files.read_names() == names
    assert os.listdir(tmp_path / "store/tmp") == []


async def test_lock_keeps_others_out(tmp_path: Path) -> None:
    files, order = StoreFiles(tmp_path), []

    async def write(name: str) -> None:
        async with files.locked():
            order.append(f"{name} in")
            await asyncio.sleep(0.03)
            order.append(f"{name} out")

    await asyncio.gather(write("a"), write("b"), write("c"))
    assert [item.split()[1] for item in order] == ["in", "out"] * 3


async def test_store_path_with_a_colon_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="colon"):
        async with StoreFiles(tmp_path / "a:b").locked():
            pass


async def test_store_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match="cannot use the image store") as caught:
        async with StoreFiles(tmp_path / "file/store").staging():
            pass
    assert "Not a directory" in str(caught.value)
    assert caught.value.hint == "", "he who asks is root already"


def test_digest_never_becomes_a_path(tmp_path: Path) -> None:
    with pytest.raises(ImageParseError):
        ImageStore(tmp_path).rootfs_path("sha256:../../etc")


async def test_finish_goes_on_when_cancelled() -> None:
    done, may_end = [], asyncio.Event()

    async def work() -> str:
        await may_end.wait()
        done.append("work")
        return "result"

    may_end.set()
    assert await finish(work()) == "result"
    may_end.clear()
    task = asyncio.create_task(finish(work()))
    await asyncio.sleep(0.01)
    task.cancel()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == ["work", "work"]


def test_sizes_count_hard_links_once_and_follow_nothing(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tmp_path / "outside").write_bytes(bytes(4 << 20))
    (tree / "a").write_bytes(os.urandom(1 << 20))
    before_bytes = scan_disk_bytes(tree)
    (tree / "sub/b").hardlink_to(tree / "a")
    (tree / "link").symlink_to(tmp_path / "outside")
    (tree / "dirlink").symlink_to(tmp_path)
    assert scan_disk_bytes(tree) - before_bytes < 1 << 19
    assert measure_tree(tree) < 3 << 20
    assert measure_tree(tmp_path / "nowhere") == 0


def _elf(kind: int) -> bytes:
    """A 64-bit little-endian header with one program header of that kind (elf(5))."""
    head = b"\x7fELF\x02\x01\x01".ljust(32, b"\0") + struct.pack("<QQIHHH", 64, 0, 0, 64, 56, 1)
    return head.ljust(64, b"\0") + struct.pack("<I", kind).ljust(56, b"\0")


def test_static_programs_are_told_from_dynamic_ones() -> None:
    check_static(_elf(1), Path("/bin/busybox"))
    for data, cause in (
        (_elf(3), "dynamically linked"),
        (_elf(1)[:60], "truncated"),
        (_elf(1)[:66], "truncated"),
        (b"\x7fELF", "truncated"),
        (b"#!/bin/sh\n", "not an ELF program"),
    ):
        with pytest.raises(ImageError, match=cause) as caught:
            check_static(data, Path("/bin/busybox"))
        assert "busybox-static" in caught.value.hint


def test_public_names() -> None:
    assert katapod.images.__all__ == [
        "DEFAULT_ROOT",
        "Access",
        "AmbiguousName",
        "BrokenImage",
        "ImageError",
        "ImageNotFound",
        "ImageStore",
        "Progress",
        "RegistryDenied",
        "RegistryUnreachable",
        "StoreDamaged",
        "StoreFull",
        "WrongPlatform",
    ]
