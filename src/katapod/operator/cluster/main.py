"""`kata-operator`: the cluster's half of the operator, as the pod of its Deployment runs it."""

import argparse
import logging
import os
import sys

from katapod import __version__
from katapod.model.errors import KatapodError
from katapod.operator.cluster.objects import Settings

__all__ = ["main"]


def main() -> int:
    options = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    try:
        from katapod.operator.cluster.operate import operate
    except ModuleNotFoundError as exc:
        print(f"kata-operator: cannot run: the Python module {exc.name} is not installed", file=sys.stderr)
        print("  hint: pip install 'katapod[operator]'", file=sys.stderr)
        return 1
    try:
        operate(Settings(options.namespace, options.node_image, __version__), liveness=options.liveness)
    except KatapodError as exc:
        print(f"kata-operator: {exc}", *([f"  hint: {exc.hint}"] if exc.hint else []), sep="\n", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kata-operator", description=__doc__)
    parser.add_argument(
        "--namespace",
        default=os.environ.get("KATAPOD_NAMESPACE", "katapod"),
        help="where node jobs run; $KATAPOD_NAMESPACE, or katapod",
    )
    parser.add_argument(
        "--node-image",
        default=os.environ.get("KATAPOD_NODE_IMAGE", f"katapod.io/node:{__version__}"),
        help="image of node jobs; $KATAPOD_NODE_IMAGE, or katapod.io/node:VERSION",
    )
    parser.add_argument("--liveness", metavar="URL", help="serve /healthz there, as http://0.0.0.0:8080/healthz")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
