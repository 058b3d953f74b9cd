"""What concerns a whole run of tests: who runs beside whom, and one strict look for leaks at the end of all.

Tests of one file share containers and daemons, so that one worker runs them (`--dist loadfile`), and so do files that
use the same thing of the machine (TOGETHER). A test that needs the machine to itself has the marker `alone`, and runs
in a part of `make test` of its own (tools/run-tests).

The process that the user started lists all that Katapod has on the machine before the first test and after the last
worker has ended. What is new then was left by a test, whether it carries a name or not; the workers' notes say after
which test it was first seen.
"""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from kit.leaks import claimed_names, inventory, settle, strangers

__all__ = ["SEEN", "TIMES", "TOGETHER", "read_times"]

OTHERS_HERE = bool(os.environ.get("KATAPOD_TESTS_SHARED_HOST"))
ON_THE_MACHINE = ("tests/integration/", "tests/e2e/")
TOGETHER = {
    "tests/integration/test_cni_plugins.py": "tests/e2e/test_run_network.py",
    "tests/integration/test_operator_node.py": "tests/e2e/test_kubernetes.py",
    "tests/e2e/test_kubernetes_figures.py": "tests/e2e/test_kubernetes.py",
    "tests/e2e/test_kubernetes_life.py": "tests/e2e/test_kubernetes.py",
    "tests/e2e/test_kubernetes_operator.py": "tests/e2e/test_kubernetes.py",
    "tests/e2e/test_kubernetes_pods.py": "tests/e2e/test_kubernetes.py",
}
"""Files that one worker runs with another: both use the built-in bridge, whose leases are in one directory; or all
of them have a kit.cluster_node, which at its end removes the directories that it mounts on.
"""
TIMES = Path(__file__).with_name("file-times.txt")
"""Seconds and file, of a run of `make test` on two cores, which writes build/test-results/file-times.txt."""


class WholeRun:
    """Notes of the process that the user started."""

    def __init__(self) -> None:
        self.before = inventory()
        self.touched = False  # a test that uses the machine has been run
        self.names = set(claimed_names())
        self.seen_after: dict[str, list[str]] = {}
        self.left: list[str] = []

    def learn(self, worker: str, names: list[str], seen: dict[str, str]) -> None:
        self.names.update(names)
        for line, test in seen.items():
            self.seen_after.setdefault(line, []).append(f"{test} ({worker})")

    def first_seen(self, line: str) -> str:
        return ", ".join(self.seen_after.get(line, [])) or "the last test that was looked at"


SEEN = pytest.StashKey[WholeRun]()


def read_times(text: str) -> dict[str, float]:
    """Seconds by what one worker runs together, whose times are added."""
    times: dict[str, float] = {}
    for line in text.splitlines():
        seconds, file = line.split()
        together = TOGETHER.get(file, file)
        times[together] = times.get(together, 0.0) + float(seconds)
    return times


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of workers: what takes longest comes first, so that none has much left when the others are done."""
    if _is_worker(config):
        times = read_times(TIMES.read_text())
        files = (item.nodeid.partition("::")[0] for item in items)
        taken = {file: times.get(TOGETHER.get(file, file), 0.0) for file in files}
        items.sort(key=lambda item: -taken[item.nodeid.partition("::")[0]])


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workeroutput")


def pytest_sessionstart(session: pytest.Session) -> None:
    if not _is_worker(session.config):
        session.config.stash[SEEN] = WholeRun()
        session.config.pluginmanager.register(_Reports(session.config.stash[SEEN]))


class _Reports:
    """Learns from reports, which come from the workers too, whether there is anything to look for."""

    def __init__(self, run: WholeRun) -> None:
        self._run = run

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._run.touched = self._run.touched or report.nodeid.startswith(ON_THE_MACHINE)


class _ByFile(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """As `--dist loadgroup` should do it, whose groups are lost: xdist 3.8 appends them to an attribute that pytest 9.2
    has no more."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return TOGETHER.get(file, file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    return _ByFile(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker has ended: take over its notes."""
    output = getattr(node, "workeroutput", {})
    if "claimed" in output:
        node.config.stash[SEEN].learn(node.gateway.id, output["claimed"], output["strangers"])


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    if _is_worker(session.config):
        output: dict[str, Any] = session.config.workeroutput  # type: ignore[attr-defined]
        output |= {"claimed": sorted(claimed_names()), "strangers": strangers()}
        return (yield)
    yield  # the fixtures of the session, and the workers, end here
    run = session.config.stash[SEEN]
    if not run.touched:
        return None
    run.learn("alone", sorted(claimed_names()), strangers())
    run.left = settle(run.before, run.names if OTHERS_HERE else None)
    if run.left and (report := session.config.getoption("xmlpath")):
        lines = "\n".join(f"{line} (first seen after {run.first_seen(line)})" for line in run.left)
        Path(report).with_suffix(".left").write_text(f"{lines}\n")  # for the summary of tools/run-tests
    if run.left and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash.get(SEEN, None)
    if run is None or not run.touched:
        return
    scope = "of this run's names" if OTHERS_HERE else "on the whole machine"
    if not run.left:
        terminalreporter.write_line(f"nothing {scope} was left behind")
        return
    terminalreporter.section(f"left behind {scope}", red=True)
    for line in run.left:
        terminalreporter.write_line(f"{line}\n    first seen after {run.first_seen(line)}")
