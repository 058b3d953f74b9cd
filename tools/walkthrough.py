"""Renew the outputs in docs/walkthrough.md and docs/walkthrough.zh.md: run the tour on a real pod, as root.

    .venv/bin/python tools/walkthrough.py

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
from kit.containerd import CGROUP_PARENT  # noqa: E402
from kit.tour import HOSTNAME, Tour, touring  # noqa: E402
from kit.tour_steps import STEPS  # noqa: E402

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
    text = re.sub(r"^(Build Host +: ).*", r"\1node", text, flags=re.MULTILINE)
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def main() -> int:
    parser = argparse.ArgumentParser(description="Renew the outputs in docs/walkthrough.md and docs/walkthrough.zh.md.")
    parser.parse_args()
    if os.geteuid() != 0:
        parser.error("needs root: it runs pods, and mounts")
    with tempfile.TemporaryDirectory(prefix="tour") as scratch, touring(Path(scratch)) as tour, tour.systemd():
        blocks = {}
        for step in STEPS:
            print(step.key, file=sys.stderr)
            said = neutral(tour.say(step), tour)
            blocks[step.key] = "\n".join(["```console", f"# {step.shown}", *([said] if said else []), "```"])
    for page in PAGES:
        text = page.read_text()
        if missing := set(blocks) - set(re.findall(r"<!-- (W\d+ \S+) -->", text)):
            print(f"{page}: has no block for {', '.join(sorted(missing))}", file=sys.stderr)
            return 1
        page.write_text(BLOCK.sub(lambda found: found[1] + blocks[found[2]], text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
