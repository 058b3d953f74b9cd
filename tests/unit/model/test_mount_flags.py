"""Values of the flags that mount something."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from katapod.model import mount_flags as flags
from katapod.model.errors import UsageError


def refuses(parse: Callable[[str], object], text: str, cause: str) -> None:
    """`parse` must refuse `text`, quote it, say why, and give an example that it takes itself."""
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert cause in str(caught.value)
    assert repr(text)[1:20] in str(caught.value)
    example = caught.value.hint.removeprefix("for example: ").split(" ", 1)[1]
    parse(example)


def volume(text: str) -> flags.Volume | flags.NamedVolume:
    return flags.parse_volume(text, "/home/me")


@pytest.mark.parametrize(
    ("text", "source", "destination", "read_only"),
    [
        ("/a:/b", "/a", "/b", False),
        ("/a:/b:ro", "/a", "/b", True),
        ("/a:/b:rw,z", "/a", "/b", False),
        ("/a/:/b/", "/a", "/b", False),
        ("/mit Leerzeichen/ü:/名 前:ro", "/mit Leerzeichen/ü", "/名 前", True),
        ("./x:/b", "/home/me/x", "/b", False),
        (".:/b", "/home/me", "/b", False),
        ("../x:/b", "/home/x", "/b", False),
        ("//a//b/.:/c//d/.", "/a/b", "/c/d", False),
        ("/a:/b:ro,rprivate,Z", "/a", "/b", True),
    ],
)
def test_volumes(text: str, source: str, destination: str, read_only: bool) -> None:
    assert volume(text) == flags.Volume(source=source, destination=destination, read_only=read_only)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("a", "the path in the container, 'a', is not absolute"),
        ("a/b:/b", "for a directory write ./a/b"),
        ("_a:/b", "neither the name of a volume nor a path"),
        (":/b", "the source is empty"),
        ("/a:", "is not absolute"),
        ("/a:b", "the path in the container, 'b', is not absolute"),
        ("/a:/b/../c", "has a '..' component"),
        ("/a:/", "root cannot be mounted over"),
        ("/a://.", "root cannot be mounted over"),
        ("/a:/b:ro:z", "more than three parts"),
        ("/a:/b:fast", "unknown option 'fast'"),
        ("/a:/b:", "unknown option ''"),
        ("/a:/b:ro,rw", "both ro and rw"),
        ("/a:/b:rshared", "cannot propagate into a VM"),
        ("/a:/b\0c", "NUL"),
    ],
)
def test_bad_volumes(text: str, cause: str) -> None:
    refuses(volume, text, cause)


@settings(max_examples=50)
@given(st.text(max_size=20))
def test_a_volume_is_absolute_and_tidy_or_refused(text: str) -> None:
    try:
        found = volume(f"/src:/{text}")
    except UsageError:
        return
    assert found.destination.startswith("/")
    assert not {"", ".", ".."} & set(found.destination[1:].split("/"))


@pytest.mark.parametrize(
    ("text", "destination", "options"),
    [
        ("/tmp", "/tmp", "noexec,nosuid,nodev"),
        ("/tmp/:size=64m,mode=1777", "/tmp", "noexec,nosuid,nodev,size=64m,mode=1777"),
        ("/tmp:exec", "/tmp", "nosuid,nodev,exec"),
        ("/tmp:suid,dev,ro", "/tmp", "noexec,suid,dev,ro"),
        ("/tmp:noexec", "/tmp", "nosuid,nodev,noexec"),
        ("/tmp:ro,rw", "/tmp", "noexec,nosuid,nodev,rw"),
        (
            "/tmp:size=1k,size=50%,uid=1,gid=2,nr_inodes=10k",
            "/tmp",
            "noexec,nosuid,nodev,size=50%,uid=1,gid=2,nr_inodes=10k",
        ),
    ],
)
def test_tmpfs(text: str, destination: str, options: str) -> None:
    assert flags.parse_tmpfs(text) == flags.TmpfsMount(destination=destination, options=tuple(options.split(",")))


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("tmp", "is not absolute"),
        ("/", "root cannot be"),
        ("/a/../b", "'..' component"),
        ("/tmp:size=big", "'size=big' has no value that tmpfs understands"),
        ("/tmp:mode=999", "has no value"),
        ("/tmp:foo", "unknown option 'foo'"),
        ("/tmp:ro=1", "unknown option 'ro=1'"),
    ],
)
def test_bad_tmpfs(text: str, cause: str) -> None:
    refuses(flags.parse_tmpfs, text, cause)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/data", flags.NamedVolume(name="", destination="/data")),
        ("db:/data", flags.NamedVolume(name="db", destination="/data")),
        ("db:/data:ro,nocopy", flags.NamedVolume(name="db", destination="/data", read_only=True, copy=False)),
    ],
)
def test_named_volumes(text: str, found: flags.NamedVolume) -> None:
    assert volume(text) == found


def mount(text: str) -> object:
    return flags.parse_mount(text, "/home/me")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("type=bind,source=/a,target=/b", flags.Volume(source="/a", destination="/b")),
        ("type=bind,src=./a,dst=/b,ro", flags.Volume(source="/home/me/a", destination="/b", read_only=True)),
        ("type=bind,src=a,dst=/b,readonly=false", flags.Volume(source="/home/me/a", destination="/b")),
        ("type=bind,src=/a,dst=/b,bind-propagation=rprivate", flags.Volume(source="/a", destination="/b")),
        ("type=bind,src=/a:b,dst=/b", flags.Volume(source="/a:b", destination="/b")),
        ("source=db,destination=/b", flags.NamedVolume(name="db", destination="/b")),
        ("type=volume,target=/b,volume-nocopy", flags.NamedVolume(name="", destination="/b", copy=False)),
        (
            "type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=1777",
            flags.TmpfsMount(destination="/t", options=("noexec", "nosuid", "nodev", f"size={1 << 20}", "mode=1777")),
        ),
        ("type=tmpfs,target=/t", flags.TmpfsMount(destination="/t", options=("noexec", "nosuid", "nodev"))),
    ],
)
def test_mounts(text: str, found: object) -> None:
    assert mount(text) == found


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("type=npipe,target=/b", "the type 'npipe' is none of"),
        ("type=bind,source=/a", "it has no target"),
        ("type=bind,target=/b", "a bind mount needs a source"),
        ("type=bind,source=/a,target=b", "is not absolute"),
        ("type=bind,source=/a,target=/b,bind-propagation=rshared", "cannot propagate"),
        ("type=bind,source=/a,target=/b,fast", "unknown key 'fast'"),
        ("type=bind,source=/a,target=/b,ro=perhaps", "neither true nor false"),
        ("type=tmpfs,source=/a,target=/b", "a tmpfs has no source"),
        ("type=tmpfs,target=/b,tmpfs-mode=x", "'x' is not a mode"),
        ("type=volume,source=a/b,target=/b", "'a/b' is not the name of a volume"),
        ("type=volume,volume-driver=nfs,target=/b", "the driver local only"),
        ("/a:/b", "it has no target"),
    ],
)
def test_bad_mounts(text: str, cause: str) -> None:
    refuses(mount, text, cause)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/dev/vdb", ("/dev/vdb", "/dev/vdb", "rwm")),
        ("/dev/vdb:r", ("/dev/vdb", "/dev/vdb", "r")),
        ("/dev/vdb:/dev/x:rw", ("/dev/vdb", "/dev/x", "rw")),
    ],
)
def test_devices(text: str, found: tuple[str, str, str]) -> None:
    device = flags.parse_device(text)
    assert (device.source, device.destination, device.access) == found


@pytest.mark.parametrize("text", ["vdb", "/dev/a:/dev/b:/dev/c", "/dev/a:x"])
def test_bad_devices(text: str) -> None:
    refuses(flags.parse_device, text, "absolute")
