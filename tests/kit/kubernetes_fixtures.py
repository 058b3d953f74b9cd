"""Fixtures for tests on a real Kubernetes: see kit.kubernetes. Such tests have the mark `needs_kubelet`."""

from collections.abc import Iterator

import pytest

from kit.kubernetes import Kubernetes, Namespace, kubernetes_running


@pytest.fixture(scope="module")
def cluster(accelerator: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubernetes]:
    """A cluster that the tests of a module share; its sandboxes run by what the module's tests do."""
    with kubernetes_running(tmp_path_factory.mktemp("kubernetes")) as found:
        yield found


@pytest.fixture
def ns(cluster: Kubernetes) -> Iterator[Namespace]:
    """A namespace of `cluster` for one test; its pods are gone at the end."""
    found = Namespace(cluster)
    found.open()
    yield found
    found.close()
