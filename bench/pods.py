"""Pods by the CRI, as a kubelet starts them: with the tests' containerd and their client of the CRI."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.measure import BenchError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from kit.containerd import Containerd, containerd_running
from kit.cri import Cri, CriError

__all__ = ["CRI_EMULATED", "CRI_KATAPOD", "CRI_RUNC", "PodEngine", "pod_engine"]

CRI_RUNC, CRI_KATAPOD, CRI_EMULATED = "CRI, runc", "CRI, Katapod", "CRI, Katapod by emulation"
HANDLERS = {CRI_RUNC: "runc", CRI_KATAPOD: "kata", CRI_EMULATED: "kata-emulated"}
OUTPUT_LIMIT_S = 120.0
ANNOUNCED = {"cpu_shares": 2}  # by a kubelet, of a pod without limits and requests


class PodEngine:
    """A containerd with its CRI."""

    def __init__(self, node: Containerd) -> None:
        self._node = node
        for who in HANDLERS:  # what a first pod builds, later ones find
            self.start_and_end(who)

    def start_and_end(self, who: str) -> tuple[float, float]:
        """Seconds until the workload's line is in its log, and those to stop and remove the pod. Raises BenchError."""
        cri = Cri(self._node, HANDLERS[who])
        try:
            began = time.monotonic()
            pod = cri.run_pod(resources=ANNOUNCED)
            container = pod.start("sh", "-c", "echo ready; exec sleep 1000")
            log = Path(pod.container(container).log_path)
            while not (log.exists() and "ready" in log.read_text()):
                if time.monotonic() - began > OUTPUT_LIMIT_S:
                    raise BenchError(f"{who}: the pod's workload has written nothing after {OUTPUT_LIMIT_S:.0f} s")
                time.sleep(0.002)
            started = time.monotonic()
            pod.stop_and_remove()
            return started - began, time.monotonic() - started
        except (CriError, AssertionError) as error:
            raise BenchError(f"{who}: {error}") from error
        finally:
            with contextlib.suppress(AssertionError):
                cri.remove_all()
            cri.close()


@contextlib.contextmanager
def pod_engine(config: Path, emulated: Path) -> Iterator[PodEngine]:
    """Serve until the end of the block. `config`, `emulated`: of Katapod. Raises BenchError."""
    try:
        with containerd_running(config, {HANDLERS[CRI_EMULATED]: emulated}) as node:
            yield PodEngine(node)
    except AssertionError as error:
        raise BenchError(f"cannot start pods by the CRI: {error}") from error
