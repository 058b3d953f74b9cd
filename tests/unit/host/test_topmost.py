"""Which mounts are unmounted with all that is below them."""

from katapod.host.mounts import topmost


def test_only_the_highest_of_each_branch() -> None:
    points = ["/s/shared/a b", "/s/mounts/a b", "/s/shared", "/s/mounts", "/s/mounts-2", "/t"]
    assert topmost(points) == {"/s/shared": False, "/s/mounts": False, "/s/mounts-2": True, "/t": True}


def test_a_name_that_begins_like_another_is_not_below_it() -> None:
    assert topmost(["/s/a", "/s/a-b", "/s/a/b"]) == {"/s/a": False, "/s/a-b": True}


def test_what_is_mounted_twice_at_one_place_is_named_once() -> None:
    assert topmost(["/s", "/s"]) == {"/s": True}
    assert topmost([]) == {}
