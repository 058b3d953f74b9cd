"""A whole run of tests: what each worker has left, what carries nobody's name, and which worker runs which file."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kit.leaks
from kit.kata import RUN_PREFIX
from kit.leaks import expected, inventory, settle
from kit.whole_run import TIMES, TOGETHER, read_times

TOP = Path(__file__).resolve().parents[2]
CONFTEST = f"""
import sys
sys.path.insert(0, {str(TOP / "tests")!r})
pytest_plugins = ["kit.whole_run"]

import pytest
import kit.leaks
from kit.leaks import find_leaks, inventory

kit.leaks.SETTLE_S = 0.2  # what these tests leave does not go

@pytest.fixture(autouse=True)
def _probe(request):
    before = inventory()
    yield
    left = find_leaks(before, request.node.nodeid)
    assert left == []
"""
TESTS = """
from pathlib import Path
from kit.kata import RUN_PREFIX

def test_named():
    Path("/dev/shm", f"{RUN_PREFIX}{MARK}").touch()

def test_nameless():
    Path("/dev/shm", MARK).touch()

def test_clean():
    pass
"""


WORKERS = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")


def run_pytest(top: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    ours = env | {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "KATAPOD_TESTS"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words, "tests"],
        cwd=top, env=ours, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    print(done.stdout)
    return done


@pytest.mark.parametrize("workers", [(), WORKERS], ids=["one process", "two workers"])
def test_what_is_left_is_found(tmp_path: Path, workers: tuple[str, ...]) -> None:
    mark = f"left-{os.getpid()}-{len(workers)}"
    folder = tmp_path / "tests" / "e2e"
    folder.mkdir(parents=True)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    alone: x\n")
    for number, test in enumerate(("named", "nameless", "clean")):
        header, *bodies = TESTS.split("\ndef ")
        body = next(body for body in bodies if body.startswith(f"test_{test}"))
        (folder / f"test_{number}_{test}.py").write_text(f"{header}\nMARK = {mark!r}\n\ndef {body}")
    try:
        done = run_pytest(tmp_path, "-q", *workers)
    finally:
        for file in Path("/dev/shm").glob(f"*{mark}"):
            file.unlink()
    assert done.returncode == 1
    assert f"entry /dev/shm/{mark}\n" in done.stdout
    assert "ERROR tests/e2e/test_0_named.py::test_named" in done.stdout
    if workers:  # nobody's at once, but known at the end, with where it was first seen
        assert "ERROR tests/e2e/test_1_nameless.py" not in done.stdout
        told = done.stdout.partition("left behind on the whole machine")[2]
        assert f"/dev/shm/{mark}\n    first seen after tests/e2e/test_" in told
    else:
        assert "ERROR tests/e2e/test_1_nameless.py::test_nameless" in done.stdout


def test_what_tests_share_is_no_leak_while_it_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit.leaks, "SETTLE_S", 0.0)
    before, shared = inventory(), Path("/dev/shm", f"{RUN_PREFIX}shared")
    names: set[str] = set()
    shared.touch()
    try:
        with expected(lambda: names):
            assert settle(before, {RUN_PREFIX}) == [f"entry {shared}"]
            names.add(shared.name)
            assert settle(before, {RUN_PREFIX}) == []
        assert settle(before, {RUN_PREFIX}) == [f"entry {shared}"]
    finally:
        shared.unlink()


def test_one_worker_runs_a_file_and_what_belongs_to_it_and_long_ones_come_first(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    files = [*sorted({*TOGETHER, *TOGETHER.values()}), "tests/e2e/test_a.py", "tests/e2e/test_b.py"]
    times = read_times(TIMES.read_text())
    longest = sorted(times, key=lambda file: -times[file])[:2]
    files += [file for file in longest if file not in files]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("".join(f"def test_{number}():\n    pass\n" for number in range(4)))
    done = run_pytest(tmp_path, "-v", *WORKERS, KATAPOD_TESTS_SHARED_HOST="1")
    assert done.returncode == 0
    ran = re.findall(r"^\[(gw\d)\].* PASSED ([\w/.]+)::", done.stdout, re.MULTILINE)
    assert len(ran) == 4 * len(files)
    assert {next(file for worker, file in ran if worker == first) for first in ("gw0", "gw1")} == set(longest)
    workers = {file: {worker for worker, that in ran if that == file} for file in files}
    assert all(len(those) == 1 for those in workers.values())
    assert all(workers[file] == workers[other] for file, other in TOGETHER.items())
    assert len(set.union(*workers.values())) == 2
