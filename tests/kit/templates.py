"""The dimension "templates": all tests on real VMs run with them on (the default) or off.

KATAPOD_TESTS_TEMPLATES=off switches them off for a whole test run: every `kata-runtime` that the tests start gets a
configuration without them, and so do the configurations that tests write themselves. Tests that take the fixture
`templates` run both ways in each test run; use it for what every start depends on.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["KATA", "kata_command", "templates_are_on", "with_templates"]

KATA = str(Path(sys.executable).with_name("kata-runtime"))
WITHOUT = Path(__file__).with_name("no-templates.toml")
_on = [os.environ.get("KATAPOD_TESTS_TEMPLATES", "on") != "off"]


def templates_are_on() -> bool:
    return _on[-1]


@contextlib.contextmanager
def with_templates(on: bool) -> Iterator[None]:
    """Switch them on or off for the block."""
    _on.append(on)
    try:
        yield
    finally:
        _on.pop()


def kata_command(*args: str) -> list[str]:
    """`kata-runtime ARGS`. A --config among `args` counts, since the last one does."""
    return [KATA, *([] if templates_are_on() else ["--config", str(WITHOUT)]), *args]
