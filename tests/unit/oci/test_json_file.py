"""Objects in JSON files that an engine names."""

from pathlib import Path

import pytest

from katapod.oci.errors import OciError
from katapod.oci.json_file import read_object


def test_an_object_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('{"a": 1}')
    assert read_object(str(path), 8) == {"a": 1}
    with pytest.raises(OciError, match="it has more than 7 bytes"):
        read_object(str(path), 7)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "it is not JSON"), ("[" * 100_000, "it is not JSON"), ("[]", "it is not an object"), ("", "it is not JSON")],
    ids=["cut", "deep", "list", "empty"],
)
def test_what_is_no_object(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(OciError, match=f"cannot read {path}: {words}"):
        read_object(str(path), 1 << 20)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_object(str(tmp_path / "missing"), 1)
