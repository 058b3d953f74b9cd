"""Text that has to be UTF-8. Pure, and light: every command line goes through it."""

from katapod.model.errors import UsageError
from katapod.model.plain import plain

__all__ = ["need_text"]


def need_text(flag: str, value: str) -> None:
    """Refuse bytes that are no UTF-8: what a container is to do stands in a JSON file, which has text alone.

    Source: OCI runtime specification, config.md; RFC 8259, section 8.1.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        shown = plain(value[:200])
        raise UsageError(
            f"cannot use {flag} {shown}: it is not valid UTF-8, which a container's configuration cannot hold",
            hint="only paths of this host can have them, such as the source of -v",
        ) from None
