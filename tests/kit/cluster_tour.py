"""The walkthrough's rows about the operator, on a Kubernetes whose only node has nothing of ours as they begin.

Both images are made by `make operator-image node-image`; they are imported into the node's containerd, and no registry
is asked. The operator runs in a pod, and its node job in another one: both are the kubelet's.
"""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kit.control_plane import BIN, ControlPlane
from kit.kata import KATA
from kit.kubernetes import Kubernetes
from kit.machine_config import MachineConfigOperator, add_openshift_node, install_types
from kit.oci_archive import BUSYBOX
from kit.operator_cluster import operating, operator_plane
from kit.tour_steps import CLUSTER, Place, Step

__all__ = ["KATACONFIG", "ClusterTour", "missing_images", "needs_images", "openshift_touring"]

TOP = Path(__file__).resolve().parents[2]
IMAGES = (TOP / "build/katapod-operator.oci.tar", TOP / "build/katapod-node.oci.tar")
KATACONFIG = """\
apiVersion: kataconfiguration.openshift.io/v1
kind: KataConfig
metadata:
  name: example-kataconfig
"""
DEPLOYMENT = f"""\
apiVersion: apps/v1
kind: Deployment
metadata:
  name: mypod
  labels:
    app: mypod
spec:
  replicas: 1
  selector:
    matchLabels:
      app: mypod
  template:
    metadata:
      labels:
        app: mypod
    spec:
      runtimeClassName: kata
      containers:
      - name: mypod
        image: {BUSYBOX}
        command:
          - sleep
          - infinity
"""
LIMIT_S = 3700.0


def missing_images() -> list[str]:
    return [path.name for path in IMAGES if not path.exists()]


needs_images = pytest.mark.skipif(
    bool(missing_images()), reason=f"{', '.join(missing_images())} not in build: make operator-image node-image"
)


class ClusterTour:
    """Each step is run once, after all those before it."""

    def __init__(self, cluster: Kubernetes, scratch: Path) -> None:
        """`scratch`: an empty directory, where the commands are typed."""
        self.cluster, self.scratch = cluster, scratch
        self._said: dict[str, str] = {}
        self._failure: AssertionError | None = None
        (scratch / "kataconfig.yaml").write_text(KATACONFIG)
        (scratch / "deployment.yaml").write_text(DEPLOYMENT)
        (scratch / "packaging").symlink_to(TOP / "packaging")
        for archive in IMAGES:
            cluster.node.ok("ctr", "--namespace", "k8s.io", "images", "import", str(archive), limit_s=1200)

    def __call__(self, key: str) -> str:
        """What the step with this key says, such as "W1 get"."""
        if self._failure is not None:
            raise self._failure
        for step in CLUSTER:
            if step.key not in self._said:
                try:
                    self._said[step.key] = self._run(step)
                except AssertionError as exc:
                    self._failure = exc
                    raise
            if step.key == key:
                return self._said[key]
        raise KeyError(key)

    def _run(self, step: Step) -> str:
        if step.place is Place.CLUSTER_NODE:
            return self.cluster.node.ok("sh", "-c", step.command)
        return run_as_administrator(self.cluster.plane, step.command, self.scratch)


def run_as_administrator(plane: ControlPlane, command: str, scratch: Path) -> str:
    """What a shell's command says, which has to succeed, with kubectl and kata-runtime at hand."""
    environment = {
        "PATH": f"{BIN}:{Path(KATA).parent}:/usr/bin:/bin",
        "HOME": str(plane.directory),
        "KUBECONFIG": str(plane.admin),
        "COLUMNS": "120",
        "LC_ALL": "C.UTF-8",
    }
    done = subprocess.run(
        plane.command("bash", "-e", "-c", command),
        cwd=scratch,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.returncode}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@contextlib.contextmanager
def openshift_touring(directory: Path) -> Iterator[Callable[[Step], str]]:
    """An OpenShift of a master and two workers, none of which is real, whose KataConfig is Ready."""
    with operator_plane(directory) as plane:
        install_types(plane)
        add_openshift_node(plane, "master-0", "master")
        for name in ("worker-0", "worker-1"):
            add_openshift_node(plane, name, "worker")
        operator = MachineConfigOperator(plane)
        operator.begin("master", "worker")
        with operator, operating(plane):
            plane.kubectl("apply", "-f", "-", text=KATACONFIG)
            plane.kubectl("wait", "--for=condition=Ready", "kataconfig", "--all", "--timeout=180s")
            yield lambda step: run_as_administrator(plane, step.command, directory)
