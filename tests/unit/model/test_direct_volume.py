"""mountInfo.json of direct volumes."""

import json

import pytest

from katapod.model.direct_volume import parse_mount_info, volume_name
from katapod.model.errors import SpecError, UsageError

GOOD = {"volume-type": "block", "device": "/dev/vg/lv", "fstype": "ext4"}


def test_what_drivers_write() -> None:
    metadata = {"fsGroup": "1000", "fsGroupChangePolicy": "OnRootMismatch"}
    full = GOOD | {"metadata": metadata, "options": ["ro", "noatime"], "later": 1}
    info = parse_mount_info(json.dumps(full).encode(), "it")
    assert (info.device, info.fstype, info.options) == ("/dev/vg/lv", "ext4", ("ro", "noatime"))
    assert (info.read_only, info.fs_group, info.fs_group_only_if_root_differs) == (True, 1000, True)
    least = parse_mount_info(json.dumps(GOOD | {"metadata": None, "options": None}).encode(), "it")
    assert (least.read_only, least.fs_group, least.fs_group_only_if_root_differs) == (False, None, False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"volume-type": "spdkvol"}, "only block is"),
        ({"device": "vda"}, "not an absolute path"),
        ({"device": 5}, "cannot read it"),
        ({"fstype": "ext4,/x"}, "cannot be one"),
        ({"fstype": ""}, "cannot be one"),
        ({"metadata": {"encryptionKey": "k"}}, "not encryptionKey"),
        ({"metadata": {"fsGroup": "wheel"}}, "not a group number"),
        ({"metadata": {"fsGroupChangePolicy": "Sometimes"}}, "none of Always, OnRootMismatch"),
    ],
)
def test_what_no_guest_can_be_given(changes: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        parse_mount_info(json.dumps(GOOD | changes).encode(), "it")


def test_names_of_directories() -> None:
    assert volume_name("/a") == "L2E="
    assert volume_name("/\xff?>") == "L8O_Pz4="  # base64 for URLs
    assert len(volume_name("/" + "a" * 188)) == 252
    for path in ("a", "/a\0", "/" + "a" * 192):
        with pytest.raises(UsageError):
            volume_name(path)
