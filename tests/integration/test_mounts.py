"""Mounts of the host's side, on real mounts: what the guest sees of them, and what their removal leaves alone."""

import contextlib
import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapod.host.mountinfo import mounts_below
from katapod.host.mounts import (
    bind,
    export_directory,
    mount_given,
    mount_overlay,
    shared_memory_size,
    unmount_below,
)
from katapod.host.removal import remove_tree
from katapod.host.state import write_atomically
from katapod.kernel.mount import MNT_DETACH, MS_PRIVATE, MS_SHARED, mount, umount
from katapod.model import oci
from katapod.model.errors import KatapodError, NoSpace, NotFound
from katapod.model.mount_options import Access
from katapod.sandbox.engine_bundle import carried_spec
from katapod.sandbox.shared_volumes import SharedVolumes

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

PROCESS = oci.Process(args=("sh",), cwd="/")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that shares its mounts with its peers, as / does under systemd."""
    root = tmp_path / "host"
    root.mkdir()
    mount("host", str(root), "tmpfs", 0, "size=8m,mode=755")
    mount("none", str(root), None, MS_PRIVATE)
    mount("none", str(root), None, MS_SHARED)
    yield root
    while points := mounts_below(tmp_path):
        with contextlib.suppress(OSError):  # an unmount of one peer takes the others along
            umount(points[0], MNT_DETACH)


@pytest.fixture
def volume(host: Path) -> Path:
    """A directory of the user with a second file system mounted below it."""
    volume = host / "volume"
    (volume / "disk").mkdir(parents=True)
    (volume / "data").write_text("precious")
    mount("disk", str(volume / "disk"), "tmpfs", 0, "size=1m")
    (volume / "disk" / "data").write_text("precious too")
    return volume


@pytest.fixture
def share(host: Path) -> Path:
    share = host / "share"
    export_directory(share / "mounts", share / "shared")
    return share


def test_the_guest_sees_what_is_bound_later(share: Path, volume: Path) -> None:
    bind(volume, share / "mounts" / "v")
    seen = share / "shared" / "v"
    assert (seen / "data").read_text() == "precious"
    assert (seen / "disk" / "data").read_text() == "precious too"
    (seen / "new").write_text("from the guest")
    assert (volume / "new").read_text() == "from the guest"


def test_read_only_at_its_top_only(share: Path, volume: Path) -> None:
    """As "ro" of a bind mount means, in contrast to "rro"."""
    bind(volume, share / "mounts" / "v", Access.TOP_READ_ONLY)
    seen = share / "shared" / "v"
    with pytest.raises(OSError, match="Read-only"):
        (seen / "new").write_text("")
    (seen / "disk" / "new").write_text("written")
    assert (volume / "disk" / "new").read_text() == "written"


def bind_mount(source: Path, *options: str) -> oci.Mount:
    return oci.Mount(destination="/data", type="bind", source=str(source), options=("rbind", *options))


def test_a_source_is_in_the_share_once(share: Path, host: Path) -> None:
    """For all containers that have it, and read-only until one of them may write."""
    volume, other = host / "plain", host / "other"
    volume.mkdir()
    other.mkdir()
    volumes = SharedVolumes(share / "mounts")
    reader = volumes.add(bind_mount(volume, "ro"), "c1")
    assert volumes.add(bind_mount(volume, "rro"), "c2") == reader
    with pytest.raises(OSError, match="Read-only"):
        (share / "shared" / reader / "x").write_text("")
    writer = volumes.add(bind_mount(volume), "c1")
    assert writer != reader
    (share / "shared" / writer / "x").write_text("written")
    assert volumes.add(bind_mount(volume), "c2") == writer
    assert volumes.add(bind_mount(other), "c2") not in (writer, reader)
    for container, left in (("c1", 3), ("c1", 3), ("c2", 0)):
        volumes.drop(container)
        assert len(list((share / "mounts").iterdir())) == left
    assert (volume / "x").read_text() == "written"


def test_what_has_mounts_below_is_shared_by_equal_access_only(share: Path, volume: Path) -> None:
    volumes = SharedVolumes(share / "mounts")
    names = [volumes.add(bind_mount(volume, *options), "c1") for options in ((), ("ro",), ("rro",), ("ro",))]
    assert len(set(names)) == 3
    assert names[1] == names[3]
    volumes.drop("c1")


def test_without_what_is_mounted_below(share: Path, volume: Path) -> None:
    bind(volume, share / "mounts" / "v", recursive=False)
    assert list((share / "shared" / "v" / "disk").iterdir()) == []


def test_the_guest_cannot_add_to_the_top_of_the_share(share: Path) -> None:
    with pytest.raises(OSError, match="Read-only") as caught:
        (share / "shared" / "x").write_text("")
    assert caught.value.errno == errno.EROFS


@pytest.mark.parametrize("place", ["data", "disk/data"])
def test_a_read_only_volume_is_read_only_for_virtiofsd_too(share: Path, volume: Path, place: str) -> None:
    """The guest's own `ro` is no wall: a hostile guest kernel would ignore it."""
    bind(volume, share / "mounts" / "v", Access.READ_ONLY)
    for view in ("mounts", "shared"):
        with pytest.raises(OSError, match="Read-only"):
            (share / view / "v" / place).write_text("overwritten")
    (volume / place).write_text("the owner may")


def test_a_read_only_file(share: Path, volume: Path) -> None:
    bind(volume / "data", share / "mounts" / "f", Access.READ_ONLY)
    with pytest.raises(OSError, match="Read-only"):
        (share / "shared" / "f").write_text("overwritten")


def test_removal_unmounts_nothing_of_the_user(share: Path, volume: Path) -> None:
    """A bind of a shared mount is its peer: an unmount below it would reach the user's own tree."""
    bind(volume, share / "mounts" / "v")
    remove_tree(share)
    assert not share.exists()
    assert (volume / "disk" / "data").read_text() == "precious too"


def test_removal_while_in_use_unmounts_nothing_of_the_user(share: Path, volume: Path) -> None:
    bind(volume, share / "mounts" / "v")
    with (share / "shared" / "v" / "disk" / "data").open() as busy:
        remove_tree(share)
        assert busy.read() == "precious too"
    assert (volume / "disk" / "data").read_text() == "precious too"


def test_mounts_made_later_by_the_host_stay_out_of_the_guest(share: Path, volume: Path) -> None:
    bind(volume, share / "mounts" / "v")
    (volume / "late").mkdir()
    mount("late", str(volume / "late"), "tmpfs", 0, "size=1m")
    (volume / "late" / "secret").touch()
    assert list((share / "shared" / "v" / "late").iterdir()) == []


def test_removal_through_a_symbolic_link_spares_what_is_bound(host: Path, volume: Path) -> None:
    """/var/lib may be a link to another disk: mountinfo names the real path only."""
    (host / "real").mkdir()
    (host / "link").symlink_to("real")
    layers = host / "link" / "layers"
    bind(volume, layers / "lower")
    assert len(mounts_below(layers)) == 2
    remove_tree(layers)
    assert not layers.exists()
    assert (volume / "data").read_text() == "precious"
    assert (volume / "disk" / "data").read_text() == "precious too"


def test_a_neighbour_with_a_longer_name_is_left_alone(host: Path, volume: Path) -> None:
    bind(volume, host / "a" / "v")
    bind(volume, host / "ab" / "v")
    remove_tree(host / "a")
    assert (host / "ab" / "v" / "data").read_text() == "precious"


def test_names_with_blanks_and_beyond_ascii(host: Path, volume: Path) -> None:
    source = host / "a b\tc\\d ü"
    source.mkdir()
    (source / "x").touch()
    target = host / "t" / "e f\nü"
    bind(source, target)
    assert mounts_below(host / "t") == [str(target)]
    unmount_below(host / "t")
    assert mounts_below(host / "t") == []


def test_binding_what_is_not_there(host: Path) -> None:
    with pytest.raises(NotFound, match=r"cannot mount .*/none: No such file"):
        bind(host / "none", host / "t")
    assert not (host / "t").exists()


def test_binding_to_an_impossible_place_is_a_clear_error(host: Path, volume: Path) -> None:
    with pytest.raises(KatapodError, match=r"cannot bind .* File name too long"):
        bind(volume, host / ("x" * 300))


def test_overlay_keeps_the_image_as_it_was(host: Path) -> None:
    lower, layers = host / "lower", host / "layers"
    lower.mkdir(mode=0o751)
    os.chown(lower, 12, 34)
    (lower / "kept").write_text("old")
    target = host / "root"
    mount_overlay(lower, layers / "upper", layers / "work", target)
    status = target.stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o751, 12, 34)
    (target / "kept").write_text("new")
    (target / "added").touch()
    remove_tree(target)
    assert (lower / "kept").read_text() == "old"
    assert not (lower / "added").exists()


@pytest.mark.parametrize("kind", ["bind", "below a bind", "overlay"])
def test_device_nodes_can_be_made_but_not_opened(share: Path, volume: Path, host: Path, kind: str) -> None:
    """The guest's kernel opens its own devices; on the host a node would be the host's device."""
    if kind == "overlay":
        mount_overlay(volume, host / "upper", host / "work", share / "mounts" / "v")
    else:
        bind(volume, share / "mounts" / "v")
    node = share / "shared" / "v" / ("disk" if kind == "below a bind" else "") / "null"
    os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    assert os.stat(node).st_rdev == os.makedev(1, 3)
    with pytest.raises(PermissionError):
        os.open(node, os.O_WRONLY)


def test_remove_tree_twice(share: Path) -> None:
    remove_tree(share)
    remove_tree(share)


def test_a_full_file_system_leaves_the_former_content(host: Path) -> None:
    path = host / "record"
    write_atomically(path, b"first")
    (host / "filler").write_bytes(b"x" * (os.statvfs(host).f_bavail * os.statvfs(host).f_frsize))
    with pytest.raises(NoSpace, match=r"cannot write .*/record: No space left"):
        write_atomically(path, b"y" * 100_000)
    assert path.read_bytes() == b"first"
    assert sorted(os.listdir(host)) == ["filler", "record"]


def test_overlay_of_more_layers_than_options_have_room_for(tmp_path: Path) -> None:
    """As containerd describes an image of many layers: the paths do not fit into the page that mount(2) reads."""
    layers = [tmp_path / ("x" * 80) / str(number) / "fs" for number in range(60)]
    for number, layer in enumerate(layers):
        layer.mkdir(parents=True)
        (layer / f"file-{number}").write_text(str(number))
    target = tmp_path / "target"
    target.mkdir()
    before = os.getcwd()
    try:
        mount_given("overlay", "overlay", ["ro", f"lowerdir={':'.join(map(str, layers))}"], target)
        assert {path.name for path in target.iterdir()} == {f"file-{number}" for number in range(60)}
        assert os.getcwd() == before
    finally:
        unmount_below(target)


def test_what_an_engine_mounts_as_shared_memory_is_the_guests(host: Path) -> None:
    """And a volume there stays what it is, be it in memory or not."""
    for name, size in (("shm", "2m"), ("tmpfs", "1m")):
        (host / name).mkdir()
        mount(name, str(host / name), "tmpfs", 0, f"size={size}")
    assert shared_memory_size(host / "shm") == 2 << 20
    assert shared_memory_size(host / "tmpfs") is None
    assert shared_memory_size(host) is None

    def carried(source: Path, *options: str) -> oci.Mount:
        one = oci.Mount(destination="/dev/shm/", type="bind", source=str(source), options=("rbind", *options))
        spec, _ = carried_spec(
            oci.Spec(oci_version="1.0.2", process=PROCESS, root=oci.Root(path="rootfs"), mounts=(one,))
        )
        return spec.mounts[0]

    own = oci.Mount(destination="/dev/shm", type="tmpfs", source="shm", options=(f"size={2 << 20}",))
    assert carried(host / "shm", "rprivate", "rw") == own
    assert carried(host / "shm", "ro").options == ("ro", *own.options)
    for volume in (host / "tmpfs", host):
        assert carried(volume).source == str(volume)


@pytest.mark.parametrize("kind", ["link", "with a blank"])
def test_the_shims_delete_unmounts_wherever_the_bundle_is(kind: str, tmp_path: Path) -> None:
    """By a path as an engine names it; the kernel's list has another form of it. Of a container of a pod, whose server
    was killed."""
    folder = tmp_path / kind
    rootfs = folder / "bundle" / "rootfs"
    rootfs.mkdir(parents=True)
    annotations = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod"}
    (folder / "bundle" / "config.json").write_text(json.dumps({"annotations": annotations}))
    named = folder
    if kind == "link":
        named = tmp_path / "named"
        named.symlink_to(folder)
    mount("rootfs", str(rootfs), "tmpfs", 0, "size=1m")
    try:
        words = ["-namespace", "tests", "-id", "c1", "-bundle", str(named / "bundle"), "delete"]
        shim = [sys.executable, "-c", "from katapod.shim.main import main; main()"]
        done = subprocess.run([*shim, *words], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert mounts_below(folder) == []
    finally:
        unmount_below(folder)
