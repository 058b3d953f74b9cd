"""Values of the flags of `logs`. Pure."""

import re
from datetime import UTC, datetime, timedelta

from katapod.model.flags import refuse

__all__ = ["parse_tail", "parse_time"]

_DURATION = re.compile(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,9})(?:\.\d{1,9})?s)?", re.ASCII)


def parse_tail(text: str, flag: str = "--tail") -> int | None:
    """A number of lines; None for "all"."""
    if text in ("all", "-1"):
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        refuse(flag, text, "it is neither a number of lines nor all", "100")
    return int(text)


def parse_time(text: str, now: float, flag: str = "--since") -> bytes:
    """A time as entries of logs have it, in UTC with nanoseconds: of RFC 3339, of seconds since the epoch, or of how
    long ago it was."""
    try:
        found = _moment(text, now)
    except (ValueError, OverflowError):
        refuse(flag, text, "it is neither a time nor a duration", "10m")
    return f"{found.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}000Z".encode()


def _moment(text: str, now: float) -> datetime:
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text):
        return datetime.fromtimestamp(float(text), UTC)
    if text and (ago := _DURATION.fullmatch(text)):
        hours, minutes, seconds = (int(number or 0) for number in ago.groups())
        return datetime.fromtimestamp(now, UTC) - timedelta(hours=hours, minutes=minutes, seconds=seconds)
    return datetime.fromisoformat(text)  # without a zone: this host's
