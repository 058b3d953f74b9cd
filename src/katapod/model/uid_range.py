"""The user ids from which each sandbox gets one of its own: FIRST-LAST, as in configuration.toml."""

from msgspec import Struct

from katapod.model.errors import UsageError

__all__ = ["DEFAULT_UIDS", "UidRange", "parse_uid_range"]

DIGITS_MAX = 10
UID_MAX = (1 << 32) - 2  # -1 stands for no user


class UidRange(Struct, frozen=True):
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


DEFAULT_UIDS = UidRange(0x70000000, 0x7000FFFF)
"""Neither useradd(8), /etc/subuid, systemd's services and containers nor nobody has these: they lie between systemd's
ranges for containers and for foreign images (systemd's "Users, Groups, UIDs and GIDs on systemd Systems")."""


def parse_uid_range(text: str) -> UidRange:
    """Raises UsageError."""
    parts = text.split("-")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) <= DIGITS_MAX for part in parts):
        raise UsageError(
            f"cannot use {text!r} as user ids: it is not of the form FIRST-LAST", hint=f"as {DEFAULT_UIDS}"
        )
    first, last = map(int, parts)
    if not 0 < first <= last <= UID_MAX:
        raise UsageError(f"cannot use {text!r} as user ids: they go from 1 to {UID_MAX}, the lower one first")
    return UidRange(first, last)
