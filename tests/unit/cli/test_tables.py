"""Tables and sizes for people; rows may hold what a guest or an image wrote."""

import pytest

from katapod.cli.tables import Column, print_table, shown_age, shown_size


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    columns = [Column("NAME", lambda row: row[0]), Column("SIZE", lambda row: row[1])]
    print_table(columns, [("a", "1"), ("longer", "12345")])
    assert capsys.readouterr().out == "NAME    SIZE\na       1\nlonger  12345\n"


def test_an_empty_table_is_its_head(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([Column("NAME", str), Column("SIZE", str)], [])
    assert capsys.readouterr().out == "NAME  SIZE\n"


def test_control_characters_stay_out_of_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([Column("NAME", str)], ["\x1b[2Jx\ny"])
    assert capsys.readouterr().out == "NAME\n\\u001b[2Jx\\ny\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0s"),
        (0, "0s"),
        (119.9, "119s"),
        (120, "2m"),
        (7199, "119m"),
        (7200, "2h"),
        (172799, "47h"),
        (172800, "2d"),
    ],
)
def test_age(seconds: float, text: str) -> None:
    assert shown_age(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 << 10, "1.5 MiB"),
        (1 << 30, "1.0 GiB"),
        (5 << 40, "5120.0 GiB"),
    ],
)
def test_size(size: int, text: str) -> None:
    assert shown_size(size) == text
