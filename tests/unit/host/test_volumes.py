"""Named volumes on disk, and what fills them."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from katapod.host.volumes import VolumeStore
from katapod.model.errors import KatapodError, NotFound
from katapod.model.layout import Layout
from katapod.model.mount_flags import NamedVolume, Volume
from katapod.plan.container_spec import ContainerOptions
from katapod.supervisor.named_volumes import drop_anonymous, fill_volumes, with_named_volumes
from katapod.supervisor.run_request import RunRequest


def request(*volumes: NamedVolume) -> RunRequest:
    options = ContainerOptions(named_volumes=volumes)
    return RunRequest("c1", "busybox", None, None, options, True, False, "", {}, None)  # type: ignore[arg-type]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return replace(Layout(), volume_root=tmp_path / "volumes")


def test_a_volume_is_made_once_and_stays(tmp_path: Path) -> None:
    store = VolumeStore(tmp_path / "volumes")
    assert store.list() == ()
    assert store.ensure("db", labels={"a": "b"})
    (store.data("db") / "file").write_text("kept")
    assert not store.ensure("db")
    assert (store.data("db") / "file").read_text() == "kept"
    (found,) = store.list()
    assert (found.name, found.labels, found.anonymous) == ("db", {"a": "b"}, False)
    store.remove("db")
    assert store.list() == ()
    for action in (store.read, store.remove):
        with pytest.raises(NotFound, match="volume db: there is none"):
            action("db")


def test_what_was_left_behind_is_no_volume(tmp_path: Path) -> None:
    store = VolumeStore(tmp_path)
    (tmp_path / ".db.1234" / "_data").mkdir(parents=True)
    assert store.list() == ()
    store.sweep()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "volume.json").write_text("{")
    with pytest.raises(KatapodError, match="cannot read"):
        store.list()


def test_names_become_directories(layout: Layout) -> None:
    asked = request(NamedVolume(name="db", destination="/d", read_only=True), NamedVolume(name="", destination="/e"))
    found = with_named_volumes(layout, asked)
    named, anonymous = found.options.named_volumes
    assert (named.name, len(anonymous.name)) == ("db", 64)
    assert found.options.volumes == (
        Volume(source=f"{layout.volume_root}/db/_data", destination="/d", read_only=True),
        Volume(source=f"{layout.volume_root}/{anonymous.name}/_data", destination="/e"),
    )
    drop_anonymous(layout, found)
    drop_anonymous(layout, found)
    assert [each.name for each in VolumeStore(layout.volume_root).list()] == ["db"]


async def test_an_empty_volume_is_filled_from_the_image(layout: Layout, tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for directory in (root / "data" / "sub", root / "etc", outside):
        directory.mkdir(parents=True)
    (root / "data" / "file").write_text("of the image")
    (root / "data").chmod(0o750)
    (outside / "secret").write_text("of the host")
    (root / "link").symlink_to(outside)
    names = {"full": "/data", "link": "/link", "none": "/nothing", "nocopy": "/data"}
    volumes = [NamedVolume(name=name, destination=place, copy=name != "nocopy") for name, place in names.items()]
    found = with_named_volumes(layout, request(*volumes))
    await fill_volumes(layout, found, root)
    store = VolumeStore(layout.volume_root)
    assert sorted(path.name for path in store.data("full").iterdir()) == ["file", "sub"]
    assert store.data("full").stat().st_mode & 0o777 == 0o750
    assert [list(store.data(name).iterdir()) for name in ("link", "none", "nocopy")] == [[], [], []]
    (root / "data" / "late").write_text("")
    await fill_volumes(layout, found, root)
    assert not (store.data("full") / "late").exists()
