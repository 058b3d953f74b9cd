"""Names and ids."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapod.model.errors import UsageError
from katapod.model.ids import MAX_ID_LENGTH, new_id, parse_container_name, short_id

SUN_PATH_MAX = 107
PATHS = (
    "/run/vc/vm/{}/extra-monitor.sock",
    "/run/vc/vm/{}/virtiofsd.sock",
    "/run/vc/sbs/{}/shim-monitor.sock",
    "/run/kata/{}/shim-monitor.sock",
)


@pytest.mark.parametrize("name", ["c1", "web-1", "a.b_c-d", "0a", "x" * MAX_ID_LENGTH])
def test_good_names_pass_unchanged(name: str) -> None:
    assert parse_container_name(name) == name


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("", "it is empty"),
        (".", "not allowed"),
        ("..", "not allowed"),
        ("a", "too short"),
        ("-a", "not allowed"),
        ("a/b", "has a slash"),
        ("../etc", "has a slash"),
        ("a b", "not allowed"),
        ("é1", "not allowed"),
        ("ab\n", "not allowed"),
        ("x" * 65, "65 characters, at most 64"),
        ("x" * 300, "300 characters, at most 64"),
    ],
)
def test_bad_names_are_refused_with_the_cause(name: str, cause: str) -> None:
    with pytest.raises(UsageError, match=cause) as caught:
        parse_container_name(name)
    assert len(str(caught.value)) < 200
    assert caught.value.hint


def test_the_longest_name_fits_socket_paths() -> None:
    assert all(len(path.format("x" * MAX_ID_LENGTH)) <= SUN_PATH_MAX for path in PATHS)


@given(st.text(alphabet=string.printable, max_size=70))
def test_what_passes_is_one_harmless_path_component(text: str) -> None:
    try:
        name = parse_container_name(text)
    except UsageError:
        return
    assert "/" not in name
    assert name not in (".", "..")
    assert not name.startswith("-")


def test_new_ids_are_valid_names_and_differ() -> None:
    first, second = new_id(), new_id()
    assert first != second
    assert parse_container_name(first) == first
    assert len(first) == 64
    assert short_id(first) == first[:12]


def test_a_new_id_does_not_look_like_a_number() -> None:
    supply = iter([bytes.fromhex("12" * 32), bytes.fromhex("1a" * 32)])
    assert new_id(lambda size: next(supply)) == "1a" * 32
