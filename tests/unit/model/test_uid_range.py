"""The range of user ids of sandboxes."""

import pytest

from katapod.model.errors import UsageError
from katapod.model.uid_range import DEFAULT_UIDS, UidRange, parse_uid_range


def test_a_range() -> None:
    assert parse_uid_range("2000-2999") == UidRange(2000, 2999)
    assert len(parse_uid_range("5-5")) == 1
    assert parse_uid_range(str(DEFAULT_UIDS)) == DEFAULT_UIDS


@pytest.mark.parametrize(
    "text", ["", "1000", "-5", "5-", "a-b", "0-10", "10-9", "1-4294967295", "1 - 2", "1-2-3", "+1-2"]
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="cannot use"):
        parse_uid_range(text)
