"""Every move between states: the legal ones pass, all others name both states."""

import itertools

import pytest

from katapod.model.errors import InvalidState
from katapod.model.record import State
from katapod.sandbox.states import check_move, require

LEGAL = {
    ("creating", "created"),
    ("creating", "stopped"),
    ("created", "running"),
    ("created", "stopped"),
    ("running", "paused"),
    ("running", "stopped"),
    ("paused", "running"),
    ("paused", "stopped"),
}


@pytest.mark.parametrize(("present", "wanted"), list(itertools.product(State, State)))
def test_moves(present: State, wanted: State) -> None:
    if (present.value, wanted.value) in LEGAL:
        assert check_move("c1", present, wanted) is wanted
    else:
        with pytest.raises(InvalidState, match=f"container c1 from {present.value} to {wanted.value}"):
            check_move("c1", present, wanted)


def test_require() -> None:
    require("pause", "c1", State.RUNNING, State.RUNNING)
    with pytest.raises(
        InvalidState, match="cannot kill container c1 in state stopped; needs created or running or paused"
    ):
        require("kill", "c1", State.STOPPED, State.CREATED, State.RUNNING, State.PAUSED)
