"""The states of a container and the legal moves between them."""

from katapod.model.errors import InvalidState
from katapod.model.record import State

__all__ = ["check_move", "require"]

_MOVES: dict[State, frozenset[State]] = {
    State.CREATING: frozenset({State.CREATED, State.STOPPED}),
    State.CREATED: frozenset({State.RUNNING, State.STOPPED}),
    State.RUNNING: frozenset({State.PAUSED, State.STOPPED}),
    State.PAUSED: frozenset({State.RUNNING, State.STOPPED}),
    State.STOPPED: frozenset(),
}


def check_move(container_id: str, present: State, wanted: State) -> State:
    """Return `wanted`, or raise InvalidState if it cannot follow on `present`."""
    if wanted not in _MOVES[present]:
        raise InvalidState(f"cannot move container {container_id} from {present.value} to {wanted.value}")
    return wanted


def require(verb: str, container_id: str, present: State, *needed: State) -> None:
    """Raise InvalidState unless the container is in one of the states that `verb` needs."""
    if present not in needed:
        wanted = " or ".join(state.value for state in needed)
        raise InvalidState(f"cannot {verb} container {container_id} in state {present.value}; needs {wanted}")
