"""The walkthrough in English and in Chinese: the same rows, commands and outputs, and those of the tests."""

import re
from functools import cache
from pathlib import Path

import pytest

from kit.tour_steps import ENABLE_CONSOLE, STEPS

ROOT = Path(__file__).parents[3]
PAGES = (ROOT / "docs/walkthrough.md", ROOT / "docs/walkthrough.zh.md")
ROWS = [*range(1, 27)]
TESTS = (
    ROOT / "tests/e2e/test_kubernetes_operator.py",
    ROOT / "tests/e2e/test_walkthrough_rows.py",
    ROOT / "tests/integration/test_packages.py",
)


@cache
def blocks(page: Path) -> list[tuple[str, str]]:
    """(key, output) in order."""
    return re.findall(r"^<!-- (W\d+ \S+) -->\n```console\n(.*?)\n```$", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_rows_in_the_walkthroughs_order(page: Path) -> None:
    text = page.read_text()
    assert [int(row) for row in re.findall(r"^## W(\d+)[:\uff1a]", text, re.MULTILINE)] == ROWS
    for row, part in zip(ROWS, re.split(r"^## W\d+", text, flags=re.MULTILINE)[1:], strict=True):
        said = part.partition("\n")[2].partition("<!--")[0].strip()
        assert len(said) > 15, f"W{row} of {page.name} says nothing of its own"
        assert {key.split()[0] for key in re.findall(r"<!-- (W\d+ \S+) -->", part)} == {f"W{row}"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_the_tours_steps(page: Path) -> None:
    assert [key for key, _ in blocks(page)] == [step.key for step in STEPS]
    assert [text.partition("\n")[0] for _, text in blocks(page)] == [f"# {step.shown}" for step in STEPS]
    for line in ENABLE_CONSOLE:
        assert f"# {line}\n" in page.read_text()


def test_both_languages_show_the_same() -> None:
    english, chinese = (blocks(page) for page in PAGES)
    assert english == chinese
    links = [re.findall(r"\]\((?!walkthrough(?:\.zh)?\.md)([^)]+)\)", page.read_text()) for page in PAGES]
    assert links[0] == links[1]


def test_outputs_are_there_and_neutral() -> None:
    for key, text in blocks(PAGES[0]):
        assert "\n" in text or key == "W23 nft", f"{key} shows nothing; run tools/walkthrough.py"
        assert not re.search(r"\bt\d+-(c|pod)\d+|\.venv|^/work|Traceback", text), f"{key} has names of a test run"


def test_every_row_has_a_test() -> None:
    found = {int(row) for file in TESTS for row in re.findall(r"^def test_w(\d\d)_", file.read_text(), re.MULTILINE)}
    assert found == set(ROWS)
