"""Renew the outputs in docs/walkthrough.md and docs/walkthrough.zh.md: run the tour on real pods, as root.

    .venv/bin/python tools/walkthrough.py [--only node|cluster]

`node` is a pod of containerd's, `cluster` the operator on a Kubernetes, which needs its programs and both images: make
kubernetes operator-image node-image.

A block of the pages that is renewed is marked by the key of a step of tests/kit/tour_steps.py:

    <!-- W6 image -->
    ```console
    ...
    ```

The text around the blocks is written by hand. Names of this machine and of the test's containerd are made neutral.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("KATAPOD_TEST_ACCEL", "tcg")  # the tour is one of QEMU, whatever `auto` is
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kit.accel import ACCELERATOR, VARIABLE  # noqa: E402
from kit.cluster_tour import ClusterTour, openshift_touring  # noqa: E402
from kit.containerd import CGROUP_PARENT  # noqa: E402
from kit.kubernetes import kubernetes_running  # noqa: E402
from kit.tour import HOSTNAME, Tour, touring  # noqa: E402
from kit.tour_steps import CLUSTER, OPENSHIFT, STEPS, Step  # noqa: E402

os.environ.setdefault(VARIABLE, ACCELERATOR.value)  # as a fixture does for each test
PAGES = (ROOT / "docs/walkthrough.md", ROOT / "docs/walkthrough.zh.md")
BLOCK = re.compile(r"(<!-- (W\d+ \S+) -->\n)```console\n.*?^```$", re.DOTALL | re.MULTILINE)


def neutral(text: str, tour: Tour) -> str:
    """`text` without what is only this machine's, and without spaces at the ends of lines."""
    names = {
        str(tour.node.socket): "/run/containerd/containerd.sock",
        str(tour.node.run_dir): "/run/containerd",
        str(tour.node.data_dir): "/var/lib/containerd",
        str(ROOT / ".venv/bin"): "/usr/bin",
        CGROUP_PARENT: "/kubepods",
        tour.pod.config["metadata"]["name"]: HOSTNAME,
        tour.node.name: "node",
        os.uname().release: f"{os.uname().release.partition('-')[0]}-node",
    }
    for name, instead in names.items():
        text = text.replace(name, instead)
    return re.sub(r"^(Build Host +: ).*", r"\1node", text, flags=re.MULTILINE)


def block(step: Step, said: str) -> str:
    lines = [line.rstrip() for line in said.strip("\n").splitlines()]
    return "\n".join(["```console", f"# {step.shown}", *lines, "```"])


def tour_node() -> dict[str, str]:
    """Blocks, by the keys of their steps."""
    blocks = {}
    with tempfile.TemporaryDirectory(prefix="tour") as scratch, touring(Path(scratch)) as tour, tour.systemd():
        for step in STEPS:
            if step not in (*CLUSTER, *OPENSHIFT):
                print(step.key, file=sys.stderr)
                blocks[step.key] = block(step, neutral(tour.say(step), tour))
    return blocks


def tour_cluster() -> dict[str, str]:
    """The same on a Kubernetes, and on a simulated OpenShift."""
    blocks = {}
    with tempfile.TemporaryDirectory(prefix="tour") as scratch:
        places = [Path(scratch, name) for name in ("cluster", "typed", "openshift")]
        for place in places:
            place.mkdir()
        with openshift_touring(places[2]) as say:
            for step in OPENSHIFT:
                blocks[step.key] = block(step, without_fields(say(step)))
        with kubernetes_running(places[0], installed=False) as cluster:
            tour = ClusterTour(cluster, places[1])
            for step in CLUSTER:
                print(step.key, file=sys.stderr)
                blocks[step.key] = block(step, without_fields(tour(step.key)))
    return blocks


def without_fields(text: str) -> str:
    """An object without who has written which field, as newer kubectls show it."""
    return re.sub(r"^  managedFields:\n(?:  [- ].*\n)*", "", text, flags=re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description="Renew the outputs in docs/walkthrough.md and docs/walkthrough.zh.md.")
    parser.add_argument("--only", choices=("node", "cluster"), help="a part of them; both by default")
    only = parser.parse_args().only
    if os.geteuid() != 0:
        parser.error("needs root: it runs pods, and mounts")
    blocks = (tour_node() if only != "cluster" else {}) | (tour_cluster() if only != "node" else {})
    for page in PAGES:
        text = page.read_text()
        if missing := set(blocks) - set(re.findall(r"<!-- (W\d+ \S+) -->", text)):
            print(f"{page}: has no block for {', '.join(sorted(missing))}", file=sys.stderr)
            return 1
        page.write_text(BLOCK.sub(lambda found: found[1] + blocks[found[2]] if found[2] in blocks else found[0], text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
