"""What a guest can cause happens at once for a while, then at a steady rate."""

import io
import logging

import pytest

from katapod.host import log_lines
from katapod.host.allowance import Allowance
from katapod.host.log_lines import log_to


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_then_a_rate() -> None:
    clock = Clock()
    allowance = Allowance(3, 2.0, clock)
    assert [allowance.take() for _ in range(5)] == [0, 0, 0, 0.5, 1.0]
    clock.now += 1.0
    assert allowance.take() == 0.5
    clock.now += 1000
    assert [allowance.take() for _ in range(4)] == [0, 0, 0, 0.5]


def test_what_is_over_is_refused() -> None:
    clock = Clock()
    allowance = Allowance(2, 1.0, clock)
    assert [allowance.has_one() for _ in range(4)] == [True, True, False, False]
    clock.now += 1.0
    assert [allowance.has_one() for _ in range(2)] == [True, False]


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
def test_no_message_floods_the_log(monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    clock = Clock()
    monkeypatch.setattr(log_lines, "Allowance", lambda burst, per_s: Allowance(burst, per_s, clock))
    monkeypatch.setattr(log_lines, "BURST", 3)
    root, stream = logging.getLogger(), io.StringIO()
    monkeypatch.setattr(root, "handlers", [])
    before = root.level
    try:
        log_to(stream, level, "%(message)s")
        for number in range(10):
            logging.getLogger("x").warning("the guest says %d", number)
        logging.getLogger("x").warning("something else: 100%")
        clock.now += 1
        logging.getLogger("x").warning("the guest says %d", 10)
        logging.getLogger("x").warning("y" * 100_000)
    finally:
        root.setLevel(before)
    lines = stream.getvalue().splitlines()
    if level == logging.DEBUG:  # whoever asks for all gets all
        assert len(lines) == 13
    else:
        assert lines[:5] == [
            "the guest says 0",
            "the guest says 1",
            "the guest says 2",
            "something else: 100%",
            "the guest says 10 (and 7 like it were left out)",
        ]
    assert len(lines[-1]) < 10_000
