"""Text that somebody else wrote, made fit for a terminal, a log line or an error message. Pure.

Guests, images, registries and engines choose names and messages, and a terminal obeys what it is shown. Only the output
of containers themselves goes on as it is.
"""

import re

__all__ = ["LINES", "console_text", "plain"]

LINES = "\n\t"
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*+[ -/]*+[@-~]|\][^\x07\x1b]*+(?:\x07|\x1b\\)?|[^\[\]])")
"""Of terminals, ECMA-48 section 5.4, and xterm's titles."""


def plain(text: str, *, keep: str = "") -> str:
    """Printable characters as they are, others but those in `keep` as escapes, which JSON takes as well.

    A byte that was no UTF-8 (a lone surrogate, see PEP 383) is shown as \\xff. Source of what is printable: Unicode's
    categories, as str.isprintable has them; so controls of either set and marks that turn the direction are not.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if code > 0xFFFF:
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
    return _SHORT.get(char) or f"\\u{code:04x}"


def console_text(data: bytes) -> str:
    """What was written to a console, as text: without what would move a cursor or colour a line."""
    text = _SEQUENCE.sub("", data.decode(errors="replace").replace("\r", ""))
    return "".join(char for char in text if char.isprintable() or char in LINES)
