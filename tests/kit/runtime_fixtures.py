"""Fixtures for tests that drive Katapod through containerd, with runc as the reference that shows the tests right.

KATAPOD_TESTS_RUNTIMES names the runtime handlers, by commas. With `runc,kata` every test runs with kata, and those
marked `reference` with runc as well; a single handler gets every test.
"""

import os
from collections.abc import Iterator

import pytest

from kit.accel import ACCELERATOR, accelerators_for
from kit.containerd import HANDLERS, Containerd, containerd_running
from kit.cri import Cri, Pod

RUNTIMES = os.environ.get("KATAPOD_TESTS_RUNTIMES", "runc,kata").split(",")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The dimension "handler", and for Katapod's the dimension "accelerator"."""
    if "handler" in metafunc.fixturenames:
        unknown = set(RUNTIMES) - set(HANDLERS)
        assert not unknown, f"KATAPOD_TESTS_RUNTIMES has {sorted(unknown)}; known are {sorted(HANDLERS)}"
        chosen = RUNTIMES
        if len(RUNTIMES) > 1 and metafunc.definition.get_closest_marker("reference") is None:
            chosen = [name for name in RUNTIMES if name != "runc"]
        if accelerators := accelerators_for(metafunc.definition):
            both = [(name, each) for name in chosen for each in (accelerators if name != "runc" else [None])]
            ids = [f"{name}-{each or ACCELERATOR.value}" if name != "runc" else name for name, each in both]
            metafunc.parametrize(("handler", "accelerator"), both, indirect=["accelerator"], scope="module", ids=ids)
        else:
            metafunc.parametrize("handler", chosen, scope="module")


@pytest.fixture
def runtime(handler: str) -> str:
    """The runtime type, as `ctr run --runtime` takes it."""
    return HANDLERS[handler]


@pytest.fixture(scope="module")
def node(accelerator: str) -> Iterator[Containerd]:
    """A containerd that the tests of a module share; anew for each accelerator, which its shims have from it."""
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


@pytest.fixture(scope="module")
def _pod_of_module(node: Containerd, handler: str) -> Iterator[Pod]:
    found = Cri(node, handler)
    try:
        yield found.run_pod()
        found.remove_all()
    finally:
        found.close()


@pytest.fixture
def pod(_pod_of_module: Pod) -> Iterator[Pod]:
    """A pod that tests of a module share which are about containers in it; theirs are removed at the end of each."""
    _pod_of_module.cri.node.forget()
    yield _pod_of_module
    _pod_of_module.remove_containers()
