"""The markers `qemu` and `core`, and the fixture `accelerator`: see kit.accel."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.accel import ACCELERATOR, FORCED, VARIABLE, accelerators_for

ON_VMS = tuple(Path(__file__).parents[1] / level for level in ("e2e", "integration"))


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = accelerators_for(metafunc.definition)
    if chosen and "handler" not in metafunc.fixturenames:  # kit.runtime_fixtures has both dimensions
        ids = [each or ACCELERATOR.value for each in chosen]
        metafunc.parametrize("accelerator", chosen, indirect=True, scope="module", ids=ids)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("qemu")
        if marker is None:
            continue
        assert len(marker.args) == 1, f"{item.nodeid}: the marker qemu needs one reason"
        if FORCED == "uml":
            item.add_marker(pytest.mark.skip(reason=f"needs QEMU: {marker.args[0]}"))


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """With --collect-only: why tests need QEMU."""
    reasons: dict[str, int] = {}
    for item in items if config.getoption("collectonly") else ():
        if marker := item.get_closest_marker("qemu"):
            reasons[marker.args[0]] = reasons.get(marker.args[0], 0) + 1
    return [f"{count} tests need QEMU: {reason}" for reason, count in sorted(reasons.items())]


@pytest.fixture(scope="module", autouse=True)
def accelerator(request: pytest.FixtureRequest) -> Iterator[str]:
    """kvm, uml or tcg: what the sandboxes of this test run by."""
    chosen: str = getattr(request, "param", None) or ACCELERATOR.value
    with pytest.MonkeyPatch.context() as patch:
        if any(request.path.is_relative_to(folder) for folder in ON_VMS):
            patch.setenv(VARIABLE, chosen)
        yield chosen
