"""Which CPU a machine gets, and when it moves."""

from hypothesis import given
from hypothesis import strategies as st

from katapod.plan.cpu_placement import (
    ROUNDS_BEFORE_A_MOVE,
    ROUNDS_OF_REST,
    CpuTimes,
    Patience,
    busy_shares,
    choose_cpu,
    consider,
    parse_cpu_times,
)

STAT = """cpu  30 0 30 140 20 0 0 0 5 0
cpu0 10 0 20 60 10 0 0 0 5 0
cpu12 20 0 10 80 10 1 2 3 0 0
intr 1 2 3
cpufreq 1 2 3 4 5 6 7 8
"""


def test_the_times_of_each_cpu() -> None:
    assert parse_cpu_times(STAT) == {0: CpuTimes(30, 100), 12: CpuTimes(36, 126)}


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    parse_cpu_times(text)


def test_how_busy_they_were() -> None:
    before = {0: CpuTimes(10, 100), 1: CpuTimes(10, 100), 2: CpuTimes(10, 100)}
    after = {0: CpuTimes(60, 200), 1: CpuTimes(10, 100), 2: CpuTimes(5, 200), 3: CpuTimes(50, 50)}
    assert busy_shares(before, after) == {0: 0.5, 1: 0.0, 2: 0.0, 3: 0.0}


def test_the_least_loaded_is_chosen_of_those_that_are_allowed() -> None:
    assert choose_cpu({1, 2}, {}, {0: 0.0, 1: 0.9, 2: 0.5}) == 2
    assert choose_cpu({3}, {}, {}) == 3


def test_those_that_start_at_once_are_spread() -> None:
    """Their load is not seen yet."""
    machines = {0: 0, 1: 0, 2: 0}
    for _ in range(9):
        machines[choose_cpu(machines, machines, {})] += 1
    assert machines == {0: 3, 1: 3, 2: 3}


def test_a_move_takes_several_looks_and_is_followed_by_a_rest() -> None:
    busy = {0: 1.0, 1: 0.1}
    patience, moves = Patience(), []
    for _ in range(ROUNDS_BEFORE_A_MOVE + ROUNDS_OF_REST + ROUNDS_BEFORE_A_MOVE):
        moved, patience = consider(patience, 0, 1, busy, waited_share=0.5)
        moves.append(moved)
    again = ROUNDS_BEFORE_A_MOVE + ROUNDS_OF_REST + ROUNDS_BEFORE_A_MOVE - 1
    assert [at for at, moved in enumerate(moves) if moved] == [ROUNDS_BEFORE_A_MOVE - 1, again]


def test_looks_that_speak_against_it_start_anew() -> None:
    busy = {0: 1.0, 1: 0.1}
    _, patience = consider(Patience(), 0, 1, busy, waited_share=0.5)
    assert patience.rounds == 1
    for here, there, shares, waited in (
        (0, 0, busy, 0.5),  # there is none better
        (0, 1, busy, 0.1),  # it does not want for its CPU
        (0, 1, {0: 1.0, 1: 0.8}, 0.5),  # the other is as busy
    ):
        assert consider(patience, here, there, shares, waited_share=waited) == (False, Patience())
