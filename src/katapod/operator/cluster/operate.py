"""The operator as kopf runs it: what is watched, and with which credentials."""

import asyncio
import dataclasses
import logging
import os
from typing import Any

import kopf
from lightkube.config.kubeconfig import KubeConfig
from lightkube.core.exceptions import ConfigError

from katapod.model.errors import NotFound
from katapod.operator.cluster.client import ClusterClient, ClusterFailed
from katapod.operator.cluster.controller import Controller
from katapod.operator.cluster.objects import Settings

__all__ = ["operate"]

log = logging.getLogger(__name__)

ASK_S = 5.0
BACKOFFS_S = (1, 1, 2, 3, 5, 8, 13, 21, *([30] * 120))
"""An API server that is away when we begin is waited for: kopf ends after 54 s otherwise."""


def operate(settings: Settings, *, identity: str, liveness: str | None, webhook: int | None) -> None:
    """Until a signal ends it. Raises NotFound if there is no cluster."""
    for noisy in ("httpx2", "kopf.activities", "kopf.objects", "aiohttp.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        config = KubeConfig.from_env()
    except ConfigError as exc:
        raise NotFound(
            f"cannot find the cluster: {exc}", hint="it runs in a pod with a service account, or with KUBECONFIG"
        ) from exc
    asyncio.run(_operate(settings, config, identity, liveness, webhook))


async def _operate(
    settings: Settings, config: KubeConfig, identity: str, liveness: str | None, webhook: int | None
) -> None:
    registry = kopf.OperatorRegistry()
    ways = kopf.OperatorSettings()
    ways.scanning.disabled = True  # what is watched is there from the beginning, and stays
    ways.posting.enabled = False  # the events are ours
    ways.networking.error_backoffs = BACKOFFS_S
    ways.watching.server_timeout = 300  # of a watch that says nothing, which may be of a connection that is no more
    client = ClusterClient(config, settings.namespace)
    machine = await _has_machine_configs(client)
    Controller(client, settings, identity, webhook, machine=machine).register(registry)
    kopf.on.login(registry=registry)(_log_in)
    # else kopf asks who its user is, and the one that it has in a pod has no name
    os.environ.setdefault("POD_ID", identity)
    await kopf.operator(
        registry=registry,
        settings=ways,
        namespaces=[settings.namespace],
        standalone=True,
        liveness_endpoint=liveness,
    )


async def _has_machine_configs(client: ClusterClient) -> bool:
    """Asked until there is an answer: a wrong one would choose the wrong back end."""
    while True:
        try:
            return await client.has_machine_configs()
        except ClusterFailed as exc:
            log.warning("%s; again in %g s", exc, ASK_S)
            await asyncio.sleep(ASK_S)


def _log_in(**kwargs: Any) -> kopf.ConnectionInfo | None:
    """In a pod, by the address that the kubelet tells: the name kubernetes.default.svc takes a name server."""
    if (found := kopf.login_with_service_account(**kwargs)) is None:
        return kopf.login_with_kubeconfig(**kwargs)
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    return dataclasses.replace(found, server=f"https://{f'[{host}]' if ':' in host else host}:{port}")
