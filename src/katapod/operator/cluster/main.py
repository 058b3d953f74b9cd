"""`kata-operator`: the cluster's half of the operator, as the pod of its Deployment runs it."""

import argparse
import asyncio
import logging
import os
import sys
from typing import Any

import kopf
from lightkube.config.kubeconfig import KubeConfig
from lightkube.core.exceptions import ConfigError

from katapod import __version__
from katapod.operator.cluster.client import ClusterClient
from katapod.operator.cluster.controller import Controller
from katapod.operator.cluster.objects import Settings

__all__ = ["main"]


def main() -> int:
    options = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    for noisy in ("httpx2", "kopf.activities"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        config = KubeConfig.from_env()
    except ConfigError as exc:
        print(f"kata-operator: cannot find the cluster: {exc}", file=sys.stderr)
        print("  hint: it runs in a pod with a service account, or with KUBECONFIG", file=sys.stderr)
        return 1
    asyncio.run(operate(options, config))
    return 0


async def operate(options: argparse.Namespace, config: KubeConfig) -> None:
    registry = kopf.OperatorRegistry()
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True  # what is watched is there from the beginning, and stays
    settings.posting.enabled = False
    client = ClusterClient(config, options.namespace)
    Controller(client, Settings(options.namespace, options.node_image, __version__)).register(registry)
    kopf.on.login(registry=registry)(log_in)
    await kopf.operator(
        registry=registry,
        settings=settings,
        namespaces=[options.namespace],
        standalone=True,
        liveness_endpoint=options.liveness,
    )


def log_in(**kwargs: Any) -> kopf.ConnectionInfo | None:
    return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)


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
