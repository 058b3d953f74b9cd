"""What kata-operator takes on clusters of many nodes: time, requests, CPU, memory.

    PYTHONPATH=tests python -m bench.operator [--json FILE] [NODES...]

The control plane is real, the nodes are objects, and their kubelets are simulated (kit.control_plane), so that most of
the time is the job controller's and the scheduler's. Requests are counted by the API server's audit log; those of the
lease, which come with time, are left out, and watches count when they begin. Needs what the operator's tests need.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.rows import Row
from kit.control_plane import ControlPlane, SimulatedKubelet
from kit.operator_cluster import CONFIGS, operator_plane, start_operator

__all__ = ["main"]

SIZES = (10, 100, 1000)
AT_ONCE = 50  # spec.rollout.maxUnavailable
LIMIT_S = 3600.0
POLL_S = 0.5
SPEC = {
    "kataConfigPoolSelector": {"matchExpressions": [{"key": "out", "operator": "DoesNotExist"}]},
    "rollout": {"maxUnavailable": AT_ONCE},
}


class Meter:
    """Of one operator: what has been taken since the last reading."""

    def __init__(self, plane: ControlPlane, process: "subprocess.Popen[bytes]", nodes: int) -> None:
        self.plane, self.process, self.nodes = plane, process, nodes
        self.rows: list[Row] = []
        self._begin()

    def _begin(self) -> None:
        self._at, self._requests, self._cpu_s = time.monotonic(), self._count(), self._cpu()

    def _count(self) -> int:
        return sum("/leases" not in path for _, path in self.plane.operator_requests())

    def _cpu(self) -> float:
        """Source: proc(5), /proc/PID/stat, utime and stime."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _peak_mib(self) -> float:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._begin()
        yield
        time_s, cpu_s = time.monotonic() - self._at, self._cpu() - self._cpu_s
        found = [("time", time_s, "s"), ("requests", self._count() - self._requests, ""), ("CPU", cpu_s, "s")]
        for what, value, unit in (*found, ("memory", self._peak_mib(), "MiB")):
            title = f"operator, {name}, {what}"
            self.rows.append(Row(f"{title}, {self.nodes} nodes", value, unit, group="operator", metric=title))
            print(f"{self.rows[-1].name:50} {value:10.1f} {unit}", flush=True)


def wait(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"bench.operator: {what}: not within {LIMIT_S:g} s")
        time.sleep(POLL_S)


def outcome(action: str, node: str) -> tuple[str, bool]:
    more = {"accelerator": "uml", "kernel": "6.1.0", "proofS": 1.0, "engine": "containerd 1.6"}
    return json.dumps({"action": action, "ok": True, "stage": "done", **(more if action == "install" else {})}), True


def measure(nodes: int) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="katapod-bench-") as directory, operator_plane(Path(directory)) as plane:
        for number in range(nodes):
            plane.add_node(f"node-{number:04}")
        process = start_operator(plane)
        try:
            with SimulatedKubelet(plane, outcome):
                return phases(plane, Meter(plane, process, nodes))
        finally:
            process.terminate()
            process.wait()


def phases(plane: ControlPlane, meter: Meter) -> list[Row]:
    def status() -> dict[str, Any]:
        found: dict[str, Any] = plane.ask("GET", f"{CONFIGS}/kata").get("status", {})
        return found

    def ready(count: int) -> bool:
        found = status().get("kataNodes", {})
        return (found.get("readyNodeCount"), found.get("nodeCount")) == (count, count)

    def recorded(node: str) -> bool:
        return "katapod.io/record" in plane.ask("GET", f"/api/v1/nodes/{node}")["metadata"].get("annotations", {})

    def apply() -> None:
        body = {"apiVersion": "kataconfiguration.openshift.io/v1", "kind": "KataConfig", "metadata": {"name": "kata"}}
        plane.kubectl("apply", "-f", "-", text=json.dumps({**body, "spec": SPEC}))

    with meter.phase("install"):
        apply()
        wait(lambda: ready(meter.nodes), "all nodes are ready")
    wait(lambda: not plane.items("/apis/batch/v1/namespaces/katapod/jobs"), "jobs have gone")
    with meter.phase("nothing new"):
        apply()
        for number in range(10):
            beat = {"type": "Ready", "status": "True", "reason": f"beat-{number}"}
            plane.merge("/api/v1/nodes/node-0000/status", {"status": {"conditions": [beat]}})
    with meter.phase("one node out"):
        plane.merge("/api/v1/nodes/node-0001", {"metadata": {"labels": {"out": ""}}})
        wait(lambda: ready(meter.nodes - 1) and not recorded("node-0001"), "it is clean")
    with meter.phase("uninstall"):
        plane.ask("DELETE", f"{CONFIGS}/kata")
        wait(lambda: not plane.items(CONFIGS), "the KataConfig has gone")
    left = [
        one for one in plane.items("/api/v1/nodes") if "katapod.io/record" in one["metadata"].get("annotations", {})
    ]
    if left:
        raise SystemExit(f"bench.operator: {len(left)} nodes have a record still")
    return meter.rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.operator", description=__doc__)
    parser.add_argument("nodes", nargs="*", type=int, default=SIZES, help="how many; 10, 100 and 1000 by default")
    parser.add_argument("--json", type=Path, default=Path("build/bench-operator.json"), help="where rows are written")
    options = parser.parse_args()
    rows = [row for nodes in options.nodes for row in measure(nodes)]
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
