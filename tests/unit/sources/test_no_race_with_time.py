"""No unit test is judged by how long something takes: a machine may stop any process, at any point, for seconds."""

import re
from pathlib import Path

import hypothesis
import pytest

UNIT = Path(__file__).parents[1]
FILES = sorted(path for path in UNIT.rglob("*.py") if path != Path(__file__))
PASSED = re.compile(r"\b(time|monotonic|perf_counter|process_time)\(\) - \w+ [<>]")
"""What has passed, compared with a limit. What passes is counted, or passes by a clock of the test's."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_time_that_has_passed_is_compared(path: Path) -> None:
    assert not [line for line in path.read_text().splitlines() if PASSED.search(line)]


def test_hypothesis_judges_no_time() -> None:
    """Neither that of an example, nor that of making the first of them."""
    profile = hypothesis.settings.get_profile("katapod")
    assert profile.deadline is None
    assert hypothesis.HealthCheck.too_slow in profile.suppress_health_check
    for path in FILES:
        for suppressed in re.findall(r"suppress_health_check=\[([^\]]*)\]", path.read_text()):
            assert "too_slow" in suppressed, path
