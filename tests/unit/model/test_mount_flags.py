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


def volume(text: str) -> flags.Volume:
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
        ("/a", "volumes without a source are not supported"),
        ("data:/b", "named volumes are not supported"),
        ("a/b:/b", "named volumes are not supported"),
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
