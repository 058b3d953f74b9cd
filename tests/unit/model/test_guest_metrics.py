"""What a guest may say in the metrics of all sandboxes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapod.model.guest_metrics import LINE_MAX, LINES_MAX, TEXT_MAX, guest_metrics


def kept(text: str) -> str:
    return guest_metrics(text)[0]


def test_a_guest_speaks_for_itself_alone() -> None:
    text = (
        '# HELP kata_shim_threads lies\nkata_shim_threads 9\nkata_guest_load{item="load1"} 1\n# TYPE go_info gauge\n'
        "go_info 1\nprocess_x 2\n# EOF\n\nkata_agent_scrape_count 3\n"
    )
    assert kept(text) == (
        'kata_guest_load{item="load1"} 1\n# TYPE kata_agent_go_info gauge\n'
        "kata_agent_go_info 1\nkata_agent_process_x 2\nkata_agent_scrape_count 3\n"
    )


def test_a_guest_that_talks_too_much_is_cut_at_a_line() -> None:
    found, cut = guest_metrics("kata_guest_x 1\n" * 200_000)
    assert cut
    assert found == "kata_guest_x 1\n" * LINES_MAX
    line = f'kata_guest_x{{a="{"y" * 900}"}} 1\n'
    found, cut = guest_metrics(line * 2000)
    assert cut
    assert found == line * (TEXT_MAX // len(line))
    assert guest_metrics(line * 100) == (line * 100, False)


@pytest.mark.parametrize(
    "line",
    [
        'kata_guest_x{sandbox_id="other"} 1',
        'kata_guest_x{a="1",a="2"} 1',
        'kata_guest_x{a="1" 1',
        'kata_guest_x{a="1",} 1',
        'kata_guest_x{a="\\q"} 1',
        "kata_guest_x one",
        "kata_guest_x 1 2 3",
        "kata_guest_x",
        "kata_guest_x 1\r",
        "# TYPE kata_guest_x nonsense",
        "# TYPE kata_guest_x",
    ],
)
def test_one_bad_line_does_not_spoil_the_scrape_of_all(line: str) -> None:
    """Prometheus gives up a whole scrape at the first line that it cannot parse."""
    assert kept(f"{line}\nkata_guest_y 1\n") == "kata_guest_y 1\n"


@pytest.mark.parametrize("value", ["1", "-0.5", "1e+09", ".5", "NaN", "+Inf", "-Inf"])
def test_good_lines_pass(value: str) -> None:
    text = f'# HELP kata_guest_x What, "quoted".\n# TYPE kata_guest_x gauge\nkata_guest_x{{a="b \\"c\\" ,d"}} {value}\n'
    assert kept(text) == text


@given(st.text())
def test_whatever_a_guest_says_no_line_is_another_ones(text: str) -> None:
    for line in kept(text).splitlines():
        assert line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith(("kata_guest_", "kata_agent_"))


def test_one_help_and_one_type_a_name() -> None:
    """A second one costs Prometheus the scrape. Names are compared as they are passed on."""
    heads = "# HELP kata_guest_x one\n# TYPE kata_guest_x gauge\n"
    again = "".join(f"# HELP kata_guest_x number {number}\n# TYPE kata_guest_x counter\n" for number in range(50))
    assert kept(heads + again + "kata_guest_x 1\n# HELP kata_guest_x end\n") == heads + "kata_guest_x 1\n"
    assert kept("# TYPE go_x gauge\n# TYPE kata_agent_go_x counter\n") == "# TYPE kata_agent_go_x gauge\n"
    assert kept("kata_guest_x 1\n# TYPE kata_guest_x gauge\n") == "kata_guest_x 1\n"


def test_nothing_that_steers_a_terminal_passes() -> None:
    """An interface may be called by an escape sequence, and who reads metrics may sit at a terminal."""
    text = '# HELP kata_guest_x \x1b[2J\nkata_guest_x{a="\x1b]0;owned\x07\u2028"} 1\nkata_guest_\x1bx 1\n'
    expected = '# HELP kata_guest_x \\\\u001b[2J\nkata_guest_x{a="\\\\u001b]0;owned\\\\u0007\\\\u2028"} 1\n'
    assert kept(text) == expected


def test_a_long_line_is_left_out() -> None:
    digits = "kata_guest_x " + "1" * (LINE_MAX - len("kata_guest_x "))
    assert kept(f"{digits}\n{digits}1\n") == f"{digits}\n"


@pytest.mark.parametrize(
    "worst",
    [
        "kata_guest_x " + "1" * 16_000 + "x",
        "kata_guest_x " + "1" * TEXT_MAX,
        'kata_guest_x{a="' + '\\\\"' * 100_000,
        "kata_guest_x{" + 'a="1",' * 80_000,
        "go_" * 170_000,
        "\n" * (4 << 20),
        "# HELP kata_guest_x " + "\\" * TEXT_MAX,
        "x" * (4 << 20),
    ],
)
def test_the_worst_that_the_limits_allow(worst: str) -> None:
    """Hours, were an expression quadratic. Without a line of the guest's own nothing passes."""
    text, _ = guest_metrics(worst)
    assert text == ""
    short = "\n".join(worst[:LINE_MAX] for _ in range(LINES_MAX))
    assert len(guest_metrics(short)[0]) <= TEXT_MAX + LINES_MAX
