"""Bytes that once were found to matter, or stand for a kind of bad input: kept in git, replayed by each test run.

`tests/unit/seeds/KIND/NAME.hex`: hexadecimal digits; what follows a # is a comment. `to-server` is what a peer sends to
a socket of ours, `to-client` what a guest's agent answers to three calls with the stream ids 1, 3 and 5. To keep what a
fuzzing test has found, write its bytes into a new file.
"""

import re
from pathlib import Path

import pytest

__all__ = ["seeds"]

SEEDS = Path(__file__).resolve().parents[1] / "unit" / "seeds"


def seeds(kind: str) -> list[object]:
    """The seeds of a kind as parameters of a test, by their names."""
    found = [
        pytest.param(bytes.fromhex(re.sub(r"#.*", "", file.read_text())), id=file.stem)
        for file in sorted((SEEDS / kind).glob("*.hex"))
    ]
    assert found, f"there are no seeds in {SEEDS / kind}"
    return list(found)
