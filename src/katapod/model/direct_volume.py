"""A direct volume: a block device that a guest mounts itself, in place of a directory that the host would share.

Storage drivers announce it by a file beside the volume's path. Source: Kata Containers,
docs/design/direct-blk-device-assignment.md.
"""

import base64
import re

import msgspec

from katapod.model.errors import SpecError, UsageError

__all__ = ["MountInfo", "parse_mount_info", "volume_name"]

NAME_MAX = 255
METADATA_KEYS = frozenset(("fsGroup", "fsGroupChangePolicy"))
POLICIES = ("Always", "OnRootMismatch")


class MountInfo(msgspec.Struct, frozen=True, rename={"volume_type": "volume-type"}):
    """mountInfo.json. Other keys are passed over: drivers write what later versions know."""

    volume_type: str
    device: str
    fstype: str = ""
    metadata: dict[str, str] | None = None
    options: tuple[str, ...] | None = None

    @property
    def read_only(self) -> bool:
        return "ro" in (self.options or ())

    @property
    def fs_group(self) -> int | None:
        text = (self.metadata or {}).get("fsGroup", "")
        return int(text) if text else None

    @property
    def fs_group_only_if_root_differs(self) -> bool:
        return (self.metadata or {}).get("fsGroupChangePolicy") == "OnRootMismatch"


def parse_mount_info(data: bytes, where: str) -> MountInfo:
    """`where` names the text in errors. Raises SpecError, also for what no guest can be given."""
    try:
        info = msgspec.json.decode(data, type=MountInfo)
    except msgspec.DecodeError as exc:
        raise SpecError(f"cannot read {where}: {exc}") from exc
    wrong = ""
    if info.volume_type != "block":
        wrong = f"the volume type {info.volume_type!r} is not supported, only block is"
    elif not info.device.startswith("/") or "\0" in info.device:
        wrong = f"the device {info.device!r} is not an absolute path"
    elif not re.fullmatch(r"[a-z0-9_]+", info.fstype):
        wrong = f"the file system type {info.fstype!r} cannot be one"
    elif unknown := set(info.metadata or ()) - METADATA_KEYS:
        wrong = f"of metadata only {', '.join(sorted(METADATA_KEYS))} are supported, not {', '.join(sorted(unknown))}"
    elif not re.fullmatch(r"\d{0,9}", (info.metadata or {}).get("fsGroup", "")):
        wrong = "fsGroup is not a group number"
    elif (info.metadata or {}).get("fsGroupChangePolicy", POLICIES[0]) not in POLICIES:
        wrong = f"fsGroupChangePolicy is none of {', '.join(POLICIES)}"
    if wrong:
        raise SpecError(f"cannot use {where}: {wrong}")
    return info


def volume_name(volume_path: str) -> str:
    """What the directory of the volume's files is called. Raises UsageError."""
    if not volume_path.startswith("/") or "\0" in volume_path:
        raise UsageError(f"cannot use the volume path {volume_path!r}: it is not absolute")
    name = base64.urlsafe_b64encode(volume_path.encode(errors="surrogateescape")).decode()
    if len(name) > NAME_MAX:
        raise UsageError(f"cannot use the volume path {volume_path}: {NAME_MAX // 4 * 3} bytes are the most")
    return name
