"""The image store with real skopeo, umoci and files: imports, unpacking, names, removal."""

import asyncio
import gzip
import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Literal

import pytest
from images_helper import CAP_NET_BIND, MTIME, Layout, children_of, directory, file, layer, node, skopeo_copy

from katapod.images import (
    AmbiguousName,
    BrokenImage,
    ImageError,
    ImageNotFound,
    ImageStore,
    StoreFull,
    WrongPlatform,
)
from katapod.images.committing import base_config, import_root
from katapod.kernel.mount import mount, umount
from katapod.model.errors import UsageError
from katapod.model.ids import parse_container_name

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners, devices and capabilities need root")

C1, C2 = parse_container_name("c1"), parse_container_name("c2")


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "store")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def rubbish(store: ImageStore) -> list[str]:
    return sorted(os.listdir(store.root / "tmp")) if store.root.exists() else []


def unpacked(store: ImageStore) -> list[str]:
    return sorted(os.listdir(store.root / "images")) if store.root.exists() else []


async def test_layers_are_applied_faithfully(store: ImageStore, layout: Layout) -> None:
    base = layer(
        directory("d"),
        file("d/gone"),
        file("d/kept", b"kept"),
        directory("opaque"),
        file("opaque/old"),
        file("su", b"#!", 0o4755, uid=5, gid=6),
        node("hard", tarfile.LNKTYPE, "su"),
        node("soft", tarfile.SYMTYPE, "/d/kept"),
        node("null", tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3),
        node("fifo", tarfile.FIFOTYPE, mode=0o600),
        directory("sticky", 0o1777),
        file("ping", b"p", 0o755, xattrs={"security.capability": CAP_NET_BIND, "user.note": b"yes"}),
        file("große Datei", "ä".encode()),
        file("big", bytes(64 << 20)),
        file("exact", pax_headers={"mtime": f"{MTIME}.123456789"}),
    )
    upper = layer(
        file("d/.wh.gone", b""),
        directory("opaque"),
        file("opaque/.wh..wh..opq", b""),
        file("opaque/new"),
        file("d/added"),
    )
    layout.add("t", base, upper)
    record = await store.import_image(layout.ref("t"), "faithful")
    root = store.rootfs_path(record.digest)

    assert sorted(os.listdir(root / "d")) == ["added", "kept"]
    assert os.listdir(root / "opaque") == ["new"]
    su = (root / "su").stat()
    assert (stat.S_IMODE(su.st_mode), su.st_uid, su.st_gid, su.st_mtime) == (0o4755, 5, 6, MTIME)
    assert (root / "hard").stat().st_ino == su.st_ino
    assert (root / "exact").stat().st_mtime_ns == MTIME * 10**9 + 123_456_789
    assert os.readlink(root / "soft") == "/d/kept"
    assert os.lstat(root / "null").st_rdev == os.makedev(1, 3)
    assert stat.S_ISFIFO(os.lstat(root / "fifo").st_mode)
    assert stat.S_IMODE((root / "sticky").stat().st_mode) == 0o1777
    assert (root / "sticky").stat().st_mtime == MTIME
    assert os.getxattr(root / "ping", "security.capability") == CAP_NET_BIND
    assert os.getxattr(root / "ping", "user.note") == b"yes"
    assert (root / "große Datei").read_text() == "ä"
    assert (root / "big").stat().st_size == 64 << 20
    assert stat.S_IMODE(root.stat().st_mode) == 0o755
    assert record.size_bytes >= (root / "big").stat().st_blocks * 512
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700
    assert rubbish(store) == []


async def test_directory_of_no_layer_is_open_to_all_under_a_strict_umask(store: ImageStore, layout: Layout) -> None:
    layout.add("t", layer(file("opt/app/bin/tool", b"", 0o755)))
    before = os.umask(0o077)
    try:
        record = await store.import_image(layout.ref("t"))
    finally:
        os.umask(before)
    root = store.rootfs_path(record.digest)
    assert [stat.S_IMODE((root / path).stat().st_mode) for path in (".", "opt", "opt/app")] == [0o755] * 3


async def test_config_is_read(store: ImageStore, layout: Layout) -> None:
    asked = {"Entrypoint": ["/e"], "Cmd": ["a", "b"], "Env": ["K=v=w"], "User": "1:2", "WorkingDir": "/w"}
    layout.add("1.0", layer(file("e")), config=asked)
    record = await store.import_image(layout.ref("1.0"))
    assert record.names == ("layout:1.0",)
    config = record.config
    assert (config.entrypoint, config.cmd, config.env) == (("/e",), ("a", "b"), ("K=v=w",))
    assert (config.user, config.working_dir) == ("1:2", "/w")
    assert await store.list_images() == (record,)


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive", "docker-archive.gz", "dir", "zstd"])
async def test_other_transports(store: ImageStore, layout: Layout, tmp_path: Path, kind: str) -> None:
    layout.add("t", layer(file("a", b"1")), layer(file(".wh.a", b""), file("b", b"2")))
    match kind:
        case "oci-archive":
            skopeo_copy(layout.ref("t"), source := f"oci-archive:{tmp_path}/My App.oci.tar:v1")
            name = "my-app:v1"
        case "docker-archive" | "docker-archive.gz":
            skopeo_copy(layout.ref("t"), f"docker-archive:{tmp_path}/saved.tar:debian:12")
            source, name = f"docker-archive:{tmp_path}/saved.tar", "docker.io/library/debian:12"
            if kind.endswith("gz"):
                (tmp_path / "saved.tar.gz").write_bytes(gzip.compress((tmp_path / "saved.tar").read_bytes()))
                source += ".gz"
        case "dir":
            skopeo_copy(layout.ref("t"), source := f"dir:{tmp_path}/plain")
            name = "plain:latest"
        case _:
            skopeo_copy(layout.ref("t"), source := f"oci:{tmp_path}/z:t", "--dest-compress-format", "zstd")
            manifest = next(path for path in (tmp_path / "z/blobs/sha256").iterdir() if b"layers" in path.read_bytes())
            if b"tar+zstd" not in manifest.read_bytes():
                skopeo_copy(layout.ref("t"), source, "--dest-compress", "--dest-compress-format", "zstd")
            name = "z:t"
    record = await store.import_image(source)
    assert record.names == (name,)
    assert {path.name: path.read_text() for path in store.rootfs_path(record.digest).iterdir()} == {"b": "2"}
    assert rubbish(store) == []


@pytest.mark.parametrize("mode", ["w:", "w:gz", "w:bz2", "w:xz"])
async def test_a_root_file_system_as_a_tar(
    store: ImageStore, tmp_path: Path, mode: Literal["w:", "w:gz", "w:bz2", "w:xz"]
) -> None:
    (tmp_path / "root" / "bin").mkdir(parents=True)
    (tmp_path / "root" / "bin" / "program").write_text("x")
    os.link(tmp_path / "root" / "bin" / "program", tmp_path / "root" / "bin" / "name")
    (tmp_path / "root" / "link").symlink_to("bin")
    packed = tmp_path / "root.tar"
    with tarfile.open(packed, mode) as archive:
        archive.add(tmp_path / "root", ".")
    document = {**base_config(store, ""), "config": {"Cmd": ["program"]}}
    with packed.open("rb") as source:
        record = await import_root(store, source, document, "made:1", "of a test")
    assert (record.names, record.config.cmd, record.config.platform) == (("made:1",), ("program",), store.platform)
    root = store.rootfs_path(record.digest)
    assert sorted(os.listdir(root)) == ["bin", "link"]
    assert (root / "bin" / "name").samefile(root / "bin" / "program")
    assert os.readlink(root / "link") == "bin"


@pytest.mark.parametrize(
    "content", [b"", b"no tar at all" * 100, gzip.compress(b"no tar")[:-4]], ids=["nothing", "text", "cut off"]
)
async def test_what_is_no_tar(store: ImageStore, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with (
        (tmp_path / "file").open("rb") as source,
        pytest.raises(BrokenImage, match="cannot import the root file system"),
    ):
        await import_root(store, source, base_config(store, ""), "made:1", "of a test")
    assert list(store.root.iterdir()) == []


async def test_names_share_one_image_and_the_last_one_takes_it_along(store: ImageStore, layout: Layout) -> None:
    layout.add("t", layer(file("a")))
    first = await store.import_image(layout.ref("t"), "one")
    second = await store.import_image(layout.ref("t"), "registry.example/team/two:3")
    assert second.digest == first.digest
    assert second.names == ("one:latest", "registry.example/team/two:3")
    assert await store.resolve("two:3") == await store.resolve("one") == second
    assert await store.remove("one") == "one:latest"
    assert len(unpacked(store)) == 1
    assert await store.remove("team/two:3") == "registry.example/team/two:3"
    assert unpacked(store) == []
    assert rubbish(store) == []
    with pytest.raises(ImageNotFound, match="cannot find image one:latest"):
        await store.resolve("one")
    with pytest.raises(ImageNotFound, match="cannot remove image one"):
        await store.remove("one")


async def test_short_name_of_two_images_is_ambiguous(store: ImageStore, layout: Layout) -> None:
    layout.add("a", layer(file("a")))
    layout.add("b", layer(file("b")))
    await store.import_image(layout.ref("a"), "x.example/app:1")
    await store.import_image(layout.ref("b"), "y.example/app:1")
    with pytest.raises(AmbiguousName, match=r"x\.example/app:1, y\.example/app:1"):
        await store.resolve("app:1")


async def test_image_in_use_outlives_its_name(store: ImageStore, layout: Layout) -> None:
    layout.add("t", layer(file("a")))
    record = await store.acquire(layout.ref("t"), C1)
    await store.hold(record.digest, C2)
    assert record.names == (layout.ref("t"),)
    await store.remove(layout.ref("t"))
    await ImageStore(store.root).release(C1)  # another process
    assert (store.rootfs_path(record.digest) / "a").exists()
    assert [item.names for item in await store.list_images()] == [()]
    await store.release(C2)
    await store.release(C2)
    assert unpacked(store) == []
    assert os.listdir(store.root / "refs") == []
    with pytest.raises(ImageNotFound):
        await store.hold(record.digest, C1)


async def test_changed_sources_are_imported_again_and_others_are_not(
    store: ImageStore, layout: Layout, tmp_path: Path
) -> None:
    layout.add("t", layer(file("a")))
    old = await store.resolve(layout.ref("t"))
    layout.add("other", layer(file("o")))
    assert (await store.resolve(layout.ref("t"))).created == old.created
    archive = f"oci-archive:{tmp_path}/a.tar:x"
    skopeo_copy(layout.ref("t"), archive)
    assert (await store.resolve(archive)).digest == old.digest
    layout.add("t", layer(file("b")))
    skopeo_copy(layout.ref("t"), archive)
    new = await store.resolve(layout.ref("t"))
    assert new.digest != old.digest
    assert unpacked(store) != [], "the archive's name still stands for the old image"
    assert (await store.resolve(archive)).digest == new.digest
    assert unpacked(store) == [new.digest.removeprefix("sha256:")]


ESCAPES = {
    "dotdot": lambda out: [layer(file(f"../../../../../../../../../..{out}/escaped"), file("ok"))],
    "absolute": lambda out: [layer(file(f"{out}/escaped"), file("ok"))],
    "symlink": lambda out: [layer(node("l", tarfile.SYMTYPE, "/"), file(f"l{out}/escaped"), file("ok"))],
    "symlink in a lower layer": lambda out: [
        layer(node("l", tarfile.SYMTYPE, str(out))),
        layer(file("l/escaped"), file("ok")),
    ],
    "relative symlink": lambda out: [
        layer(node("l", tarfile.SYMTYPE, f"../../../../../../../../../../..{out}"), file("l/escaped"), file("ok"))
    ],
    "root is a symlink": lambda out: [layer(node(".", tarfile.SYMTYPE, str(out)), file("escaped"))],
    "hard link": lambda out: [layer(node("h", tarfile.LNKTYPE, f"{out}/canary"))],
    "hard link through a symlink": lambda out: [
        layer(node("l", tarfile.SYMTYPE, str(out)), node("h", tarfile.LNKTYPE, "l/canary"), file("h", b"bad"))
    ],
    "whiteout": lambda out: [layer(file(f"../../../../../../../../../..{out}/.wh.canary", b""), file("ok"))],
    "opaque through a symlink": lambda out: [
        layer(node("l", tarfile.SYMTYPE, str(out))),
        layer(file("l/.wh..wh..opq", b""), file("ok")),
    ],
    "device over a symlink": lambda out: [
        layer(node("l", tarfile.SYMTYPE, str(out)), node("l/canary", tarfile.CHRTYPE, devmajor=1, devminor=3))
    ],
}


@pytest.mark.parametrize("kind", ESCAPES)
async def test_hostile_layers_stay_inside(store: ImageStore, layout: Layout, tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "canary").write_text("alive")
    layout.add("t", *ESCAPES[kind](outside))
    try:
        record = await store.import_image(layout.ref("t"))
    except BrokenImage:
        assert unpacked(store) == rubbish(store) == []
    else:
        assert store.rootfs_path(record.digest).is_dir()
        assert not store.rootfs_path(record.digest).is_symlink()
    assert os.listdir(outside) == ["canary"]
    assert (outside / "canary").read_text() == "alive"
    assert (outside / "canary").stat().st_nlink == 1


async def test_overlay_xattrs_of_a_stranger_are_dropped(store: ImageStore, layout: Layout) -> None:
    layout.add("t", layer(file("f", xattrs={"trusted.overlay.redirect": b"/etc", "user.keep": b"1"})))
    record = await store.import_image(layout.ref("t"))
    assert os.listxattr(store.rootfs_path(record.digest) / "f") == ["user.keep"]


def _truncated(layout: Layout, tmp_path: Path, transport: str) -> str:
    skopeo_copy(layout.ref("t"), f"{transport}:{tmp_path}/whole.tar:x:1")
    data = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "bad.tar").write_bytes(data[: len(data) // 2])
    return f"{transport}:{tmp_path}/bad.tar"


def _flipped(layout: Layout, descriptor_digest: str) -> str:
    path = layout.blob_path(descriptor_digest)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    return layout.ref("t")


BROKEN = [
    "truncated docker-archive",
    "truncated oci-archive",
    "truncated gzip",
    "garbage docker-archive",
    "garbage oci-archive",
    "empty docker-archive",
    "empty oci-archive",
    "directory as archive",
    "layout without index",
    "index is not JSON",
    "layer missing",
    "layer flipped",
    "config missing",
    "manifest flipped",
    "wrong diff_id",
    "too few diff_ids",
    "layer is no tar",
    "config of an artifact",
    "config of the wrong type",
]


@pytest.mark.parametrize("kind", BROKEN)
async def test_broken_images_leave_nothing(store: ImageStore, layout: Layout, tmp_path: Path, kind: str) -> None:
    content = layer(file("a", os.urandom(20000)))
    descriptor = layout.add("t", content)
    manifest = layout.blob_path(descriptor["digest"]).read_text()
    config, blob = manifest.split('"digest": "')[1][:71], manifest.split('"digest": "')[2][:71]
    source = layout.ref("t")
    match kind.split():
        case ["truncated", "gzip"]:
            (tmp_path / "bad.tar.gz").write_bytes(gzip.compress(os.urandom(9000))[:5000])
            source = f"docker-archive:{tmp_path}/bad.tar.gz"
        case ["truncated", transport]:
            source = _truncated(layout, tmp_path, transport)
        case ["garbage" | "empty" as how, transport]:
            (tmp_path / "bad.tar").write_bytes(os.urandom(20000) if how == "garbage" else b"")
            source = f"{transport}:{tmp_path}/bad.tar"
        case ["directory", *_]:
            source = f"oci-archive:{layout.path}"
        case ["layout", *_]:
            (layout.path / "index.json").unlink()
        case ["index", *_]:
            (layout.path / "index.json").write_text("{]")
        case ["layer" | "config" as what, "missing"]:
            layout.blob_path(blob if what == "layer" else config).unlink()
        case ["layer", "flipped"]:
            _flipped(layout, blob)
        case ["manifest", "flipped"]:
            _flipped(layout, descriptor["digest"])
        case ["wrong", *_]:
            layout.add("t", content, diff_ids=["sha256:" + "0" * 64])
        case ["too", *_]:
            layout.add("t", content, layer(file("b")), diff_ids=["sha256:" + "0" * 64])
        case ["layer", "is", *_]:
            layout.add("t", os.urandom(5000))
        case ["config", "of", "an", *_]:
            layout.add("t", content, config={})
            path = layout.blob_path(config)
            fake = layout.blob(b"{}", "application/vnd.cncf.helm.config.v1+json")
            text = manifest.replace(config, fake["digest"]).replace(f'"size": {path.stat().st_size}', '"size": 2')
            layout._tag("t", layout.blob(text.encode(), descriptor["mediaType"]))
        case _:
            layout.add("t", content, config={"Env": "PATH=/bin"})
    with pytest.raises(BrokenImage, match=r"^cannot "):
        await store.import_image(source, "broken")
    assert unpacked(store) == rubbish(store) == []
    assert await store.list_images() == ()


async def test_missing_things_are_named(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    layout.add("t", layer(file("a")))
    skopeo_copy(layout.ref("t"), f"oci-archive:{tmp_path}/o.tar:t")
    skopeo_copy(layout.ref("t"), f"docker-archive:{tmp_path}/d.tar:x:1")
    for source in (
        layout.ref("nope"),
        f"oci:{tmp_path}/nowhere:t",
        f"oci-archive:{tmp_path}/nowhere.tar",
        f"oci-archive:{tmp_path}/o.tar:nope",
        f"docker-archive:{tmp_path}/d.tar:nope:1",
    ):
        with pytest.raises(ImageNotFound, match=r"nope|nowhere"):
            await store.import_image(source)
    layout.add("second", layer(file("b")))
    with pytest.raises(ImageNotFound, match="holds 2 images") as caught:
        await store.import_image(f"oci:{layout.path}")
    assert "second, t" in caught.value.hint
    with pytest.raises(UsageError, match="names no transport"):
        await store.import_image("debian:12")
    for wanted in (layout.ref("t"), "debian:12"):
        with pytest.raises(UsageError, match="names no registry"):
            await store.pull(wanted)
    assert unpacked(store) == rubbish(store) == []


async def test_platform_is_chosen_or_refused(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    mine = layout.add(None, layer(file("mine")))
    arm = layout.add("arm", layer(file("arm")), architecture="arm64")
    layout.add_index("both", arm64=arm, amd64=mine)
    layout.add_index("none", arm64=arm, s390x=arm)
    record = await store.import_image(layout.ref("both"))
    assert os.listdir(store.rootfs_path(record.digest)) == ["mine"]
    skopeo_copy(layout.ref("none"), f"oci-archive:{tmp_path}/none.tar:none", "--all")
    for source, found in (
        (layout.ref("arm"), "arm64/linux"),
        (layout.ref("none"), "arm64/linux, s390x/linux"),
        (f"oci-archive:{tmp_path}/none.tar:none", "arm64/linux, s390x/linux"),
    ):
        with pytest.raises(WrongPlatform) as caught:
            await store.import_image(source)
        assert str(caught.value) == (f"cannot use image {source}: it is built for {found}, this machine is amd64/linux")
    assert len(unpacked(store)) == 1
    assert rubbish(store) == []


async def test_progress_counts_up_to_all(store: ImageStore, layout: Layout, tmp_path: Path) -> None:
    layout.add("t", layer(file("r", os.urandom(30 << 20))), layer(file("s", os.urandom(5 << 20))))
    skopeo_copy(layout.ref("t"), f"docker-archive:{tmp_path}/d.tar:x:1")
    for source in (layout.ref("t"), f"docker-archive:{tmp_path}/d.tar"):
        seen: list[tuple[str, int, int | None]] = []
        await ImageStore(tmp_path / source.partition(":")[0]).import_image(
            source, progress=lambda *step, s=seen: s.append(step)
        )
        for phase in ("copy", "unpack"):
            steps = [step for step in seen if step[0] == phase]
            assert [step[1] for step in steps] == sorted(step[1] for step in steps)
            assert steps[0][1] == 0
            assert steps[-1][1] == steps[-1][2]
            assert (steps[-1][2] or 0) > 35 << 20
        assert any(0 < done < (total or 0) for _, done, total in seen), "steps between none and all"


async def test_full_disk_is_told_and_can_be_emptied(tmp_path: Path, layout: Layout) -> None:
    layout.add("small", layer(file("a", os.urandom(100_000))))
    layout.add("large", layer(file("a", os.urandom(4 << 20))))
    layout.add("huge", layer(file("a", bytes(8 << 20)), file("b", bytes(8 << 20))))
    root = tmp_path / "mounted"
    root.mkdir()
    mount("tmpfs", str(root), "tmpfs", 0, "size=2m")
    try:
        store = ImageStore(root)
        kept = await store.import_image(layout.ref("small"), "small")
        for tag in ("large", "huge"):
            with pytest.raises(StoreFull, match="no space left") as caught:
                await store.import_image(layout.ref(tag), "big")
            assert "image rm" in caught.value.hint
        assert rubbish(store) == []
        assert await store.list_images() == (kept,)
        filler = root / "filler"
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(bytes(4 << 20))
        for work in (
            store.import_image(layout.ref("small"), "again"),
            store.import_image(layout.ref("large"), "big"),
            store.root_disk(kept),
        ):
            with pytest.raises(StoreFull, match="image store") as caught:
                await work
            assert "image rm" in caught.value.hint
        await store.remove("small")
        assert unpacked(store) == rubbish(store) == []
        assert await store.list_images() == ()
    finally:
        umount(str(root))


async def test_a_full_disk_is_told_where_umoci_crashes_before_it_says_so(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout.add("small", layer(file("a", os.urandom(100_000))))
    (programs := tmp_path / "bin").mkdir()
    umoci = programs / "umoci"
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    root = tmp_path / "mounted"
    root.mkdir()
    mount("tmpfs", str(root), "tmpfs", 0, "size=2m")
    crash = "printf 'panic: d.nx != 0\\n\\ngoroutine 21 [running]:\\nx\\n\\tx.go:1\\n' >&2; exit 2"
    try:
        for fill, kind in (
            ("", ImageError),
            (f"dd if=/dev/zero of={root}/tmp/filler bs=1M count=4 2>/dev/null;", StoreFull),
        ):
            umoci.write_text(f"#!/bin/sh\n{fill}\n{crash}\n")
            umoci.chmod(0o755)
            with pytest.raises(ImageError) as caught:
                await ImageStore(root).import_image(layout.ref("small"), "small")
            assert type(caught.value) is kind
            (root / "tmp/filler").unlink(missing_ok=True)
    finally:
        umount(str(root))


async def test_busybox_is_always_there(store: ImageStore, tmp_path: Path) -> None:
    record = await store.resolve("busybox")
    root = store.rootfs_path(record.digest)
    assert record.config.cmd == ("sh",)
    run = subprocess.run(  # noqa: ASYNC221 - nothing else runs
        ["chroot", root, "/bin/sh", "-c", "id -un; stat -c %a /tmp; test -d /proc && which awk"],
        capture_output=True,
        text=True,
        check=True,
        env=dict(item.split("=", 1) for item in record.config.env),
    )
    assert run.stdout.split() == ["root", "1777", "/usr/bin/awk"]
    assert (await store.resolve("busybox:latest")).created == record.created, "made once"

    other = tmp_path / "busybox"
    shutil.copy("/bin/busybox", other)
    moved = ImageStore(store.root, busybox_program=other)
    assert (await moved.ensure_busybox()).created == record.created, "the same program elsewhere"
    with other.open("ab") as program:
        program.write(b"\0")
    changed = await moved.ensure_busybox()
    assert changed.digest != record.digest
    assert unpacked(store) == [changed.digest.removeprefix("sha256:")]
    other.unlink()
    assert await moved.ensure_busybox() == changed, "what is stored is still good"
    assert rubbish(store) == []


@pytest.mark.parametrize(
    ("program", "cause"),
    [("/nowhere/busybox", "No such file"), ("/bin/ls", "dynamically linked"), ("/etc/passwd", "not an ELF program")],
)
async def test_no_static_busybox(tmp_path: Path, program: str, cause: str) -> None:
    store = ImageStore(tmp_path / "store", busybox_program=Path(program))
    with pytest.raises(ImageError, match=cause) as caught:
        await store.ensure_busybox()
    assert "busybox-static" in caught.value.hint
    assert unpacked(store) == rubbish(store) == []


async def test_own_image_named_busybox_wins_until_it_is_removed(store: ImageStore, layout: Layout) -> None:
    layout.add("t", layer(file("mine")))
    mine = await store.import_image(layout.ref("t"), "busybox")
    assert await store.resolve("busybox") == mine
    await store.remove("busybox")
    assert (await store.resolve("busybox")).config.cmd == ("sh",)


@pytest.mark.parametrize("phase", ["copy", "unpack"])
async def test_cancelled_import_leaves_nothing(store: ImageStore, layout: Layout, phase: str) -> None:
    layout.add("t", layer(file("r", os.urandom(80 << 20))))
    reached = asyncio.Event()

    def progress(name: str, done_bytes: int, total_bytes: int | None) -> None:
        if name == phase and 0 < done_bytes < (total_bytes or 0):
            reached.set()

    task = asyncio.create_task(store.import_image(layout.ref("t"), progress=progress))
    await asyncio.wait_for(reached.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert unpacked(store) == rubbish(store) == []
    assert children_of(store.root) == []
