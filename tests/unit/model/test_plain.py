"""What others wrote, made fit for a terminal."""

import io
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapod.cli.plain_output import guard_output, raw
from katapod.host.log_lines import log_to
from katapod.model.errors import KatapodError
from katapod.model.plain import LINES, console_text, plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("café 日本", "café 日本"),
        ("\x1b[2J\x07", "\\u001b[2J\\u0007"),
        ("\x9b31m", "\\u009b31m"),  # the same as one character, which xterm obeys too
        ("a\u202eb\u200bc", "a\\u202eb\\u200bc"),  # turns the direction; has no width
        ("a\r\nb\tc\x7f", "a\\r\\nb\\tc\\u007f"),
        ("\U000e0041", "\\udb40\\udc41"),
        ("\udcff\udc80", "\\xff\\x80"),
        ("", ""),
    ],
)
def test_what_is_not_printable_is_escaped(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_what_is_kept() -> None:
    assert plain("a\n\tb\r", keep=LINES) == "a\n\tb\\r"


@given(st.text())
def test_json_stays_what_it_was(text: str) -> None:
    """It may pass here after it has been written."""
    written = json.dumps(text, ensure_ascii=False)
    assert json.loads(plain(written)) == text
    assert plain(plain(text)) == plain(text)
    assert plain(text).isprintable()


@given(st.binary(max_size=300))
def test_a_console_has_nothing_that_steers(data: bytes) -> None:
    assert all(char.isprintable() or char in LINES for char in console_text(data))


def test_a_console_loses_its_sequences() -> None:
    assert console_text(b"\x1b[31mred\x1b[0m\r\n\x1b]0;title\x07x\x1b]2;t\x1b\\y\x1bcz") == "red\nxyz"


def test_log_lines_are_one_line_each() -> None:
    root, stream = logging.getLogger(), io.StringIO()
    before, level = root.handlers[:], root.level
    root.handlers.clear()
    try:
        log_to(stream, logging.INFO, "level=%(levelname)s %(message)s")
        logging.getLogger("x").warning("the guest says: %s", "ok\nlevel=ERROR forged\x1b[2J")
        try:
            raise KatapodError("a\nb")
        except KatapodError:
            logging.getLogger("x").exception("it failed")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0] == "level=WARNING the guest says: ok\\nlevel=ERROR forged\\u001b[2J"


def test_errors_are_plain() -> None:
    error = KatapodError("cannot x: \x1b[2J\nlast lines", hint="\x07")
    assert (str(error), error.what, error.hint) == ("cannot x: \\u001b[2J\nlast lines",) * 2 + ("\\u0007",)


def test_our_output_is_plain_whoever_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    under = io.BytesIO()
    stream = io.TextIOWrapper(under, encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    guard_output()
    guard_output()
    import sys

    print("a\x1b[2Jb\u202e\udcff", "é")
    raw(sys.stdout).write("\x1b[H")
    sys.stdout.flush()
    assert under.getvalue() == b"a\\u001b[2Jb\\u202e\\xff \\xe9\n\x1b[H"
    sys.stdout.buffer.write(b"\x1b")  # of a container: as it is
    assert under.getvalue().endswith(b"\x1b")
