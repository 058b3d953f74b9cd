"""Images as disks: made once, faithful, removed with the image; by real e2fsprogs, read back by the kernel."""

import asyncio
import contextlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from images_helper import CAP_NET_BIND, MTIME, Layout, directory, file, kill_hard, layer

from katapod.images import ImageError, ImageNotFound, ImageStore
from katapod.model.errors import MissingProgram
from katapod.model.ids import parse_container_name
from katapod.model.image import ImageRecord

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners, devices and mounts need root")

C1 = parse_container_name("c1")

MAKE = """
import asyncio, sys
from pathlib import Path
from katapod.images import ImageStore
async def main():
    store = ImageStore(Path(sys.argv[1]))
    (record,) = await store.list_images()
    print(await store.root_disk(record))
asyncio.run(main())
"""


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "a store")


TIMES = {
    'a quoted " name \udcfe': 1_600_000_000_123_456_789,
    "<7>": 1_600_000_000_999_999_999,
    "before 1970": -1_500_000_000,
    "after 2038": 4_102_444_800_000_000_001,
    "plain": 1_600_000_000_000_000_000,
}


async def add_image(store: ImageStore, tmp_path: Path, *content: bytes) -> ImageRecord:
    layout = Layout(tmp_path / "layout")
    layout.add("t", *content)
    record = await store.import_image(layout.ref("t"), "t")
    await store.hold(record.digest, C1)
    return record


def start_maker(store: ImageStore) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", MAKE, store.root], stdout=subprocess.PIPE)


def check_file_system(disk: Path) -> None:
    subprocess.run(["e2fsck", "-fn", disk], check=True, capture_output=True, timeout=180)


@contextlib.contextmanager
def mounted(disk: Path, point: Path) -> Iterator[Path]:
    point.mkdir()
    subprocess.run(["mount", "-o", "loop,ro,noload", disk, point], check=True, timeout=180)
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True, timeout=180)


def described(root: Path) -> dict[str, object]:
    """All that a container can see of a tree, by path; hard links by their number."""
    found: dict[str, object] = {}
    for folder, names, files in os.walk(os.fsencode(root)):
        for name in [b".", *names, *files]:
            if name == b"." and folder != os.fsencode(root):
                continue
            path = os.path.join(folder, name)
            info = os.lstat(path)
            content: object = None
            if stat.S_ISREG(info.st_mode):
                content = (info.st_size, Path(os.fsdecode(path)).read_bytes())
            elif stat.S_ISLNK(info.st_mode):
                content = os.readlink(path)
            elif stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
                content = info.st_rdev
            attributes = {
                key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
            }
            links = 1 if stat.S_ISDIR(info.st_mode) else info.st_nlink
            found[os.fsdecode(os.path.relpath(path, os.fsencode(root)))] = (
                *(info.st_mode, info.st_uid, info.st_gid, info.st_mtime_ns, links),
                *(content, attributes),
            )
    return found


async def test_a_disk_holds_what_the_image_holds(store: ImageStore, tmp_path: Path) -> None:
    record = await add_image(
        store,
        tmp_path,
        layer(
            file("su", b"#!", 0o6755, uid=100000, gid=70000),
            file("ping", b"p", 0o755, xattrs={"security.capability": CAP_NET_BIND, "user.note": b"yes"}),
            file("große Datei", "ä".encode()),
            directory("sticky", 0o1777),
            *(file(f"many/{number}", str(number).encode()) for number in range(300)),
        ),
    )
    root = store.rootfs_path(record.digest)
    os.mknod(root / "socket", stat.S_IFSOCK | 0o755)
    os.mkfifo(root / "fifo")
    os.mknod(root / "tty", stat.S_IFCHR | 0o600, os.makedev(5, 1))
    os.mknod(root / "disk", stat.S_IFBLK | 0o600, os.makedev(300, 70000))
    os.link(root / "su", root / "hard link")
    os.symlink("nowhere", root / "soft")
    os.symlink("x" * 300, root / "long")
    (root / "not\nUTF-8 \udcff").touch()
    os.utime(root / "not\nUTF-8 \udcff", (MTIME, MTIME))  # a name with a line break has whole seconds
    for number, (name, mtime_ns) in enumerate(TIMES.items()):
        (root / name).mkdir() if number % 2 else (root / name).touch()
        os.utime(root / name, ns=(mtime_ns, mtime_ns))
    os.truncate(os.open(root / "sparse", os.O_CREAT | os.O_WRONLY), 64 << 20)
    os.setxattr(root, "user.of the root", b"\0binary\xff")
    os.chmod(root, 0o1751)
    os.chown(root, 100001, 70001)
    os.utime(root, ns=(MTIME * 10**9 + 987654321, MTIME * 10**9 + 987654321))

    disk = await store.root_disk(record)
    check_file_system(disk)
    expected = described(root)
    with mounted(disk, tmp_path / "point") as point:
        assert described(point) == expected
        free = os.statvfs(point)
        assert free.f_bavail * free.f_frsize > 30 << 30, "room to write"
    assert disk.stat().st_blocks * 512 < 16 << 20, "room that is not used costs nothing"
    assert disk.stat().st_mode == stat.S_IFREG | 0o600, "it has the image's set-user-id programs"


async def test_an_image_with_a_lost_and_found_keeps_it(store: ImageStore, tmp_path: Path) -> None:
    record = await add_image(store, tmp_path, layer(directory("lost+found", 0o700), file("lost+found/x")))
    with mounted(await store.root_disk(record), tmp_path / "point") as point:
        assert os.listdir(point / "lost+found") == ["x"]


@pytest.mark.parametrize("kind", ["file", "link to a directory", "fifo"])
async def test_what_else_is_called_lost_and_found(store: ImageStore, tmp_path: Path, kind: str) -> None:
    """mke2fs has no room for it: such images fell back to virtio-fs."""
    record = await add_image(store, tmp_path, layer(file("a/b", b"b"), file("su", b"#!", 0o6755, uid=100000)))
    root = store.rootfs_path(record.digest)
    if kind == "file":
        (root / "lost+found").write_text("found")
    elif kind == "fifo":
        os.mkfifo(root / "lost+found")
    else:
        (root / "lost+found").symlink_to("/etc")
    os.link(root / "su", root / "hard link")
    os.utime(root / "a", (MTIME, MTIME))
    os.utime(root, (MTIME, MTIME))
    expected = described(root)
    disk = await store.root_disk(record)
    check_file_system(disk)
    with mounted(disk, tmp_path / "point") as point:
        assert described(point) == expected
    assert described(root) == expected
    assert os.listdir(store.root / "tmp") == []


async def test_an_image_with_paths_that_mke2fs_cannot_take(store: ImageStore, tmp_path: Path) -> None:
    """It would write past a buffer, as root."""
    record = await add_image(store, tmp_path, layer(file("a")))
    here = store.rootfs_path(record.digest)
    for _ in range(9):
        here = here / ("d" * 99)
        here.mkdir()
    (here / ("f" * 99)).touch()  # 10 times 100 bytes
    disk = await store.root_disk(record)
    check_file_system(disk)
    disk.unlink()
    (here / ("f" * 100)).touch()
    with pytest.raises(ImageError, match="a path of 1001 bytes"):
        await store.root_disk(record)
    assert os.listdir(store.root / "tmp") == []


async def test_a_disk_is_made_once_and_goes_with_its_image(store: ImageStore, tmp_path: Path) -> None:
    record = await add_image(store, tmp_path, layer(file("a")))
    first = await asyncio.gather(*(store.root_disk(record) for _ in range(4)))
    made = os.stat(first[0])
    assert {*first} == {await store.root_disk(record)}
    assert (os.stat(first[0]).st_ino, os.stat(first[0]).st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    assert os.listdir(store.root / "tmp") == []
    await store.remove("t")
    assert first[0].exists(), "held"
    await store.release(C1)
    assert os.listdir(store.root / "images") == os.listdir(store.root / "tmp") == []
    with pytest.raises(ImageNotFound):
        await store.root_disk(record)
    assert os.listdir(store.root / "tmp") == []


async def test_two_processes_make_one_disk(store: ImageStore, tmp_path: Path) -> None:
    await add_image(store, tmp_path, layer(file("a", os.urandom(8 << 20))))
    both = [start_maker(store) for _ in range(2)]
    outputs = [await asyncio.to_thread(process.communicate, timeout=180) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1]
    assert os.listdir(store.root / "tmp") == []


async def test_a_killed_maker_leaves_no_half_disk(store: ImageStore, tmp_path: Path) -> None:
    record = await add_image(store, tmp_path, layer(file("a", os.urandom(32 << 20))))
    with start_maker(store) as maker:
        async with asyncio.timeout(180):
            while maker.poll() is None and not any((store.root / "tmp").glob("*/root-*")):  # noqa: ASYNC110
                await asyncio.sleep(0.001)  # another process writes it
        kill_hard(maker)
    disk = await store.root_disk(record)
    check_file_system(disk)
    assert os.listdir(store.root / "tmp") == []


async def test_without_mke2fs_the_error_names_its_package(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = await add_image(store, tmp_path, layer(file("a")))
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "rm").symlink_to("/bin/rm")  # the store's own need
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(MissingProgram) as caught:
        await store.root_disk(record)
    assert "mke2fs" in str(caught.value)
    assert "e2fsprogs" in caught.value.hint
