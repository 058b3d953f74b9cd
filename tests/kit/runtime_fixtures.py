"""Fixtures for tests that drive Katapod through containerd, with runc as the reference that shows the tests right.

KATAPOD_TESTS_RUNTIMES names the runtime handlers, by commas. With `runc,kata` every test runs with kata, and those
marked `reference` with runc as well; a single handler gets every test.
"""

import os
from collections.abc import Iterator

import pytest

from kit.containerd import HANDLERS, Containerd, containerd_running
from kit.cri import Cri

RUNTIMES = os.environ.get("KATAPOD_TESTS_RUNTIMES", "runc,kata").split(",")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The dimension "handler"."""
    if "handler" in metafunc.fixturenames:
        unknown = set(RUNTIMES) - set(HANDLERS)
        assert not unknown, f"KATAPOD_TESTS_RUNTIMES has {sorted(unknown)}; known are {sorted(HANDLERS)}"
        chosen = RUNTIMES
        if len(RUNTIMES) > 1 and metafunc.definition.get_closest_marker("reference") is None:
            chosen = [name for name in RUNTIMES if name != "runc"]
        metafunc.parametrize("handler", chosen, scope="module")


@pytest.fixture
def runtime(handler: str) -> str:
    """The runtime type, as `ctr run --runtime` takes it."""
    return HANDLERS[handler]


@pytest.fixture(scope="module")
def node() -> Iterator[Containerd]:
    """A containerd that the tests of a module share."""
    with containerd_running() as found:
        yield found


@pytest.fixture
def ctr(node: Containerd) -> Iterator[Containerd]:
    """`node` for one test: what it made with ctr is removed at its end."""
    node.forget()
    yield node
    node.remove_all()


@pytest.fixture
def cri(node: Containerd, handler: str) -> Iterator[Cri]:
    """The CRI of `node` for one test: pods that it left are removed at its end."""
    node.forget()
    found = Cri(node, handler)
    try:
        yield found
        found.remove_all()
    finally:
        found.close()
