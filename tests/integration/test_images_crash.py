"""Many writers at once, and writers that are killed: the store stays whole and rubbish goes."""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from images_helper import Layout, children_of, file, kill_hard, layer

from katapod.images import ImageNotFound, ImageStore
from katapod.model.ids import parse_container_name

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners, devices and capabilities need root")

IMPORT = """
import asyncio, sys
from pathlib import Path
from katapod.images import ImageStore
record = asyncio.run(ImageStore(Path(sys.argv[1])).import_image(sys.argv[2], sys.argv[3]))
print(record.digest)
"""


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def start_import(store: ImageStore, source: str, name: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", IMPORT, store.root, source, name], stdout=subprocess.PIPE)


async def test_two_processes_import_the_same_image(store: ImageStore, layout: Layout) -> None:
    layout.add("t", layer(file("a", os.urandom(4 << 20))))
    both = [start_import(store, layout.ref("t"), name) for name in ("one", "two")]
    outputs = [await asyncio.to_thread(process.communicate, timeout=180) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1]
    (record,) = await store.list_images()
    assert record.names == ("one:latest", "two:latest")
    assert os.listdir(store.root / "tmp") == []


async def test_many_tasks_import_and_remove(store: ImageStore, layout: Layout) -> None:
    layout.add("same", layer(file("same")))
    for number in range(4):
        layout.add(f"v{number}", layer(file(f"f{number}")))

    async def churn(number: int) -> None:
        user = parse_container_name(f"user{number}")
        for _ in range(2):
            await store.import_image(layout.ref(f"v{number}"), "moving")
            record = await store.acquire(layout.ref("same"), user)
            assert (store.rootfs_path(record.digest) / "same").exists()
            with contextlib.suppress(ImageNotFound):
                await store.remove(layout.ref("same"))
            assert (store.rootfs_path(record.digest) / "same").exists(), "held"
            await store.release(user)

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(churn(number))
    await store.remove("moving")
    with contextlib.suppress(ImageNotFound):
        await store.remove(layout.ref("same"))
    assert await store.list_images() == ()
    assert os.listdir(store.root / "tmp") == os.listdir(store.root / "refs") == []


@pytest.mark.parametrize("phase", ["copy", "unpack", "any"])
async def test_killed_import_is_cleaned_up_by_the_next(store: ImageStore, layout: Layout, phase: str) -> None:
    layout.add("large", layer(file("r", os.urandom(60 << 20))))
    layout.add("small", layer(file("s")))
    process = start_import(store, layout.ref("large"), "large")
    pattern = {"copy": "tmp/*/layout/oci-put-blob*", "unpack": "tmp/*/image/rootfs/r", "any": "tmp/*/lock"}[phase]
    deadline = time.monotonic() + 180
    while not any(store.root.glob(pattern)):
        assert process.poll() is None, "the import was faster than we"
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)
    kill_hard(process)
    assert process.stdout is not None
    process.stdout.close()
    for _ in range(3600):
        if not children_of(store.root):
            break
        await asyncio.sleep(0.05)
    assert children_of(store.root) == [], "skopeo and umoci die with their parent"
    assert os.listdir(store.root / "tmp") != [], "killed in the middle"

    assert await store.list_images() == ()
    record = await store.import_image(layout.ref("small"))
    assert os.listdir(store.root / "tmp") == []
    assert os.listdir(store.root / "images") == [record.digest.removeprefix("sha256:")]
    assert (await store.import_image(layout.ref("large"))).size_bytes >= 60 << 20


async def test_living_writers_are_left_alone(store: ImageStore, layout: Layout) -> None:
    layout.add("large", layer(file("r", os.urandom(40 << 20))))
    layout.add("small", layer(file("s")))
    slow = asyncio.create_task(store.import_image(layout.ref("large")))
    while not any(store.root.glob("tmp/*/layout/oci-put-blob*")):  # noqa: ASYNC110 - files tell nobody
        await asyncio.sleep(0.002)
    await store.import_image(layout.ref("small"))
    assert not slow.done()
    assert (await slow).size_bytes >= 40 << 20


async def test_leftovers_of_every_kind_go(store: ImageStore, layout: Layout) -> None:
    layout.add("t", layer(file("a")))
    await store.import_image(layout.ref("t"))
    tmp = store.root / "tmp"
    (tmp / "trash.1/rootfs").mkdir(parents=True)
    (tmp / "names.1").write_text("{")
    (tmp / "empty").mkdir()
    deep = tmp / "trash.2"
    deep.mkdir()
    _make_deep(deep, 1500)
    await store.ensure_busybox()
    assert os.listdir(tmp) == []


def _make_deep(place: Path, levels: int) -> None:
    """Deeper than Python's recursion limit and than one path can name."""
    here = os.open(place, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("directory", dir_fd=here)
        below = os.open("directory", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
