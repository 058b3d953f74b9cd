"""Work in a thread of its own, for what changes the thread itself."""

import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["in_own_thread"]

_Result = TypeVar("_Result")


def in_own_thread(work: Callable[[], _Result], *, name: str) -> _Result:
    """Run `work` in a thread that ends with it: for what changes the thread itself, such as its namespaces or its
    working directory, and must not come back to anybody. Blocks. Raises what `work` raises."""
    outcome: list[_Result] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as exc:
            failure.append(exc)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
