"""`kata-operator`: the cluster's half of the operator, as the pod of its Deployment runs it."""

import argparse
import logging
import os
import socket
import sys
import uuid

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
        settings = Settings(
            namespace=options.namespace,
            image=options.node_image,
            target=__version__,
            monitor_image=options.monitor_image,
            extension=options.extension,
            os_image=options.os_image,
        )
        operate(
            settings, identity=options.identity or own_identity(), liveness=options.liveness, webhook=options.webhook
        )
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
    parser.add_argument(
        "--monitor-image",
        default=os.environ.get("KATAPOD_MONITOR_IMAGE", f"katapod.io/operator:{__version__}"),
        help="image with kata-monitor, which runs on nodes of OpenShift; $KATAPOD_MONITOR_IMAGE, or "
        "katapod.io/operator:VERSION; empty: none runs",
    )
    parser.add_argument(
        "--extension",
        default=os.environ.get("SANDBOXED_CONTAINERS_EXTENSION", ""),
        help="extension of CoreOS that brings the runtime; $SANDBOXED_CONTAINERS_EXTENSION, or sandboxed-containers on "
        "RHEL CoreOS and kata-containers on Fedora's and CentOS's",
    )
    parser.add_argument(
        "--os-image",
        default=os.environ.get("KATAPOD_OS_IMAGE", ""),
        help="OS image for nodes of OpenShift that has the runtime in it, in place of an extension; $KATAPOD_OS_IMAGE",
    )
    parser.add_argument(
        "--identity",
        default=os.environ.get("KATAPOD_IDENTITY", ""),
        help="as which it holds the lease, by which one of several operators acts: the pod's name, so that a container "
        "that is started again goes on at once; $KATAPOD_IDENTITY, or a name of this process alone",
    )
    parser.add_argument("--liveness", metavar="URL", help="serve /healthz there, as http://0.0.0.0:8080/healthz")
    parser.add_argument("--webhook", metavar="PORT", type=int, help="serve the validating webhook there")
    return parser.parse_args()


def own_identity() -> str:
    return f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"


if __name__ == "__main__":
    sys.exit(main())
