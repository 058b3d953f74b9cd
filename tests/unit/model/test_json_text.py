"""JSON of our own files holds paths that are no UTF-8."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapod.model.errors import UsageError
from katapod.model.flags import need_text, parse_env
from katapod.model.json_text import decode_json, encode_json
from katapod.model.mount_flags import Volume, parse_volume


class Row(msgspec.Struct, frozen=True):
    path: str
    more: tuple[str, ...] = ()


@given(st.binary(max_size=40), st.sampled_from([0, 1]))
def test_whatever_a_path_is_comes_back(data: bytes, indent: int) -> None:
    row = Row(data.decode(errors="surrogateescape"), ("x",))
    text = encode_json(row, indent=indent)
    assert text.decode()
    assert decode_json(text, Row) == row
    assert json.loads(text)["path"] == row.path


@pytest.mark.parametrize("data", [b"{", b'{"path": "\\udcff"', b'{"path": 5}', b'{"path": "\\udcff", "more": 1}'])
def test_what_is_none(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_json(data, Row)


def test_what_a_container_is_told_is_text() -> None:
    need_text("-e", "é")
    with pytest.raises(UsageError, match=r"cannot use -e a\\xff: it is not valid UTF-8"):
        need_text("-e", "a\udcff")
    with pytest.raises(UsageError, match="cannot use -e X="):
        parse_env(["X"], {"X": "\udcff"})
    assert parse_volume("/a\udcff:/x", "/") == Volume(source="/a\udcff", destination="/x")
    with pytest.raises(UsageError, match="cannot use -v"):
        parse_volume("/a:/x\udcff", "/")
