"""Random names and numbers: their form, and that none comes twice."""

import uuid

from katapod.model.tokens import new_uuid, random_below, random_hex


def test_hexadecimal_names() -> None:
    found = {random_hex(8) for _ in range(100)}
    assert len(found) == 100
    assert all(len(bytes.fromhex(each)) == 8 for each in found)


def test_numbers_reach_both_ends() -> None:
    assert {random_below(3) for _ in range(200)} == {0, 1, 2}
    assert random_below(1) == 0


def test_uuids_are_of_version_4() -> None:
    found = [uuid.UUID(new_uuid()) for _ in range(100)]
    assert len(set(found)) == 100
    assert {(each.version, each.variant) for each in found} == {(4, uuid.RFC_4122)}
    assert str(found[0]) == str(uuid.UUID(str(found[0])))
