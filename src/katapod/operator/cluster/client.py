"""The one door to the API server: what changes something there, and what is asked for now and then.

Objects are dictionaries as the API has them: lightkube's classes of them would be a third of the operator's memory.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import httpx2
from lightkube.config.kubeconfig import KubeConfig
from lightkube.core.async_client import AsyncClient
from lightkube.core.exceptions import ApiError
from lightkube.core.resource import ApiInfo, NamespacedSubResource, ResourceDef
from lightkube.generic_resource import (
    Generic,
    GenericNamespacedResource,
    create_global_resource,
    create_namespaced_resource,
)
from lightkube.types import CascadeType, PatchType

from katapod.operator.cluster.changes import (
    ApplyClass,
    ApplyObject,
    Change,
    ChangeConfig,
    ChangeNode,
    CreateJob,
    DeleteClass,
    DeleteJob,
    DeleteObject,
    EvictPod,
)
from katapod.operator.cluster.election import LeaseView, parse_lease
from katapod.operator.cluster.errors import ClusterFailed, EvictionRefused
from katapod.operator.cluster.machine_config.names import API_GROUP
from katapod.operator.cluster.views import UserPod, parse_user_pod
from katapod.operator.names import GROUP, MANAGER

__all__ = ["ClusterClient", "ClusterFailed"]

log = logging.getLogger(__name__)

PAGE = 500  # pods in one answer
UNKNOWN, GONE, TAKEN, LATER = 400, 404, 409, 429

KataConfig = create_global_resource(GROUP, "v1", "KataConfig", "kataconfigs")
Node = create_global_resource("", "v1", "Node", "nodes")
RuntimeClass = create_global_resource("node.k8s.io", "v1", "RuntimeClass", "runtimeclasses")
Job: type[GenericNamespacedResource] = create_namespaced_resource("batch", "v1", "Job", "jobs")
Pod = create_namespaced_resource("", "v1", "Pod", "pods")
Event: type[GenericNamespacedResource] = create_namespaced_resource("", "v1", "Event", "events")
Lease: type[GenericNamespacedResource] = create_namespaced_resource("coordination.k8s.io", "v1", "Lease", "leases")
Secret: type[GenericNamespacedResource] = create_namespaced_resource("", "v1", "Secret", "secrets")
WebhookConfiguration = create_global_resource(
    "admissionregistration.k8s.io", "v1", "ValidatingWebhookConfiguration", "validatingwebhookconfigurations"
)

MachineConfigPool = create_global_resource(API_GROUP, "v1", "MachineConfigPool", "machineconfigpools")
OBJECTS: dict[str, Any] = {
    "MachineConfig": create_global_resource(API_GROUP, "v1", "MachineConfig", "machineconfigs"),
    "MachineConfigPool": MachineConfigPool,
    "ContainerRuntimeConfig": create_global_resource(
        API_GROUP, "v1", "ContainerRuntimeConfig", "containerruntimeconfigs"
    ),
    "DaemonSet": create_namespaced_resource("apps", "v1", "DaemonSet", "daemonsets"),
}


class Eviction(NamespacedSubResource, Generic):  # type: ignore[misc]  # as lightkube's own, which are not checked
    """The body says of which version it is: before Kubernetes 1.22 there is policy/v1beta1 only."""

    _api_info = ApiInfo(
        resource=ResourceDef("policy", "v1", "Eviction"),
        parent=ResourceDef("", "v1", "Pod"),
        plural="pods",
        verbs=["post"],
        action="eviction",
    )


class ClusterClient:
    def __init__(self, config: KubeConfig, namespace: str) -> None:
        self.namespace = namespace
        self._api = AsyncClient(config, field_manager=MANAGER)

    async def close(self) -> None:
        await self._api.aclose()

    async def carry_out(self, change: Change) -> bool:
        """False if the object it is about is no more. Raises ClusterFailed."""
        try:
            await self._ask(change)
        except ApiError as exc:
            if exc.status.code == GONE:
                return False
            if exc.status.code == TAKEN and isinstance(change, CreateJob | ApplyClass | ApplyObject):
                return True  # somebody was faster; who watches sees what there is now
            if exc.status.code == LATER and isinstance(change, EvictPod):
                raise EvictionRefused(str(exc.status.message or exc)) from exc
            raise ClusterFailed(f"cannot carry out {type(change).__name__}: {exc}") from exc
        except httpx2.HTTPError as exc:
            raise ClusterFailed(f"cannot carry out {type(change).__name__}: {exc!r}") from exc
        return True

    async def _ask(self, change: Change) -> None:
        match change:
            case ChangeNode(name, patch):
                await self._api.patch(Node, name, patch, patch_type=PatchType.MERGE)
            case CreateJob(body):
                await self._api.create(Job(**body))
            case DeleteJob(name):
                await self._api.delete(Job, name, namespace=self.namespace, cascade=CascadeType.BACKGROUND)
            case ApplyClass(body, new=True):
                await self._api.create(RuntimeClass(**body))
            case ApplyClass(body):
                patch = {"overhead": body["overhead"], "scheduling": {"$patch": "replace", **body["scheduling"]}}
                await self._api.patch(RuntimeClass, body["metadata"]["name"], patch)
            case DeleteClass(name):
                await self._api.delete(RuntimeClass, name)
            case ApplyObject(kind, body=body, new=True):
                await self._api.create(OBJECTS[kind](**body))
            case ApplyObject("DaemonSet", name, body):
                kinds, merge = OBJECTS["DaemonSet"], PatchType.MERGE
                await self._api.patch(kinds, name, body, namespace=self.namespace, patch_type=merge)
            case ApplyObject(kind, name, body):
                await self._api.patch(OBJECTS[kind], name, body, patch_type=PatchType.MERGE)
            case DeleteObject("DaemonSet", name):
                kinds = OBJECTS["DaemonSet"]
                await self._api.delete(kinds, name, namespace=self.namespace, cascade=CascadeType.BACKGROUND)
            case DeleteObject(kind, name):
                await self._api.delete(OBJECTS[kind], name)
            case EvictPod(name):
                await self._evict(name)
            case ChangeConfig(name, finalizers):
                wanted = {"metadata": {"finalizers": list(finalizers)}}
                await self._api.patch(KataConfig, name, wanted, patch_type=PatchType.MERGE)

    async def _evict(self, name: str) -> None:
        namespace, _, pod = name.partition("/")
        body: dict[str, Any] = {"kind": "Eviction", "metadata": {"name": pod, "namespace": namespace}}
        try:
            await self._api.create(Eviction(apiVersion="policy/v1", **body), pod, namespace=namespace)
        except ApiError as exc:
            if exc.status.code != UNKNOWN:
                raise
            await self._api.create(Eviction(apiVersion="policy/v1beta1", **body), pod, namespace=namespace)

    async def write_status(self, name: str, status: Mapping[str, Any]) -> bool:
        """False if there is no such KataConfig any more. Raises ClusterFailed."""
        with _failing(f"write the status of {name}"):
            try:
                await self._api.patch(KataConfig.Status, name, {"status": status}, patch_type=PatchType.MERGE)
            except ApiError as exc:
                if exc.status.code == GONE:
                    return False
                raise
        return True

    async def has_machine_configs(self) -> bool:
        """Whether the cluster has a machine-config operator, as OpenShift's have. Raises ClusterFailed."""
        with _failing("list MachineConfigPools"):
            try:
                async for _ in self._api.list(MachineConfigPool):
                    break
            except httpx2.HTTPStatusError as exc:  # of an API group that is not served: no object, so no ApiError
                if exc.response.status_code == GONE:
                    return False
                raise
        return True

    async def sandboxed_pods(self) -> tuple[UserPod, ...]:
        """Pods of any RuntimeClass that are on a node and have not ended. Raises ClusterFailed."""
        try:
            found = [parse_user_pod(body) async for body in self._api.list(Pod, namespace="*", chunk_size=PAGE)]
        except (ApiError, httpx2.HTTPError) as exc:
            raise ClusterFailed(f"cannot list pods: {exc!r}") from exc
        return tuple(one for one in found if one is not None)

    async def read_lease(self, name: str) -> LeaseView | None:
        """None if there is none. Raises ClusterFailed."""
        with _failing(f"read the lease {name}"):
            try:
                return parse_lease(await self._api.get(Lease, name, namespace=self.namespace))
            except ApiError as exc:
                if exc.status.code == GONE:
                    return None
                raise

    async def write_lease(self, body: dict[str, Any]) -> LeaseView | None:
        """Create it, or replace the version that `body` names; None if somebody was faster. Raises ClusterFailed."""
        name = body["metadata"]["name"]
        lease = Lease(**{**body, "metadata": {**body["metadata"], "namespace": self.namespace}})
        known = "resourceVersion" in body["metadata"]
        with _failing(f"write the lease {name}"):
            try:
                return parse_lease(await (self._api.replace(lease) if known else self._api.create(lease)))
            except ApiError as exc:
                if exc.status.code in (GONE, TAKEN):
                    return None
                raise

    async def read_secret(self, name: str) -> dict[str, Any] | None:
        """Raises ClusterFailed."""
        with _failing(f"read the secret {name}"):
            try:
                return dict(await self._api.get(Secret, name, namespace=self.namespace))
            except ApiError as exc:
                if exc.status.code == GONE:
                    return None
                raise

    async def write_secret(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """Create it, or replace the version that `body` names; None if somebody was faster. Raises ClusterFailed."""
        known = "resourceVersion" in body["metadata"]
        with _failing(f"write the secret {body['metadata']['name']}"):
            try:
                return dict(await (self._api.replace(Secret(**body)) if known else self._api.create(Secret(**body))))
            except ApiError as exc:
                if exc.status.code in (GONE, TAKEN):
                    return None
                raise

    async def set_ca_bundle(self, name: str, bundle: str) -> bool:
        """For all webhooks of a configuration; False if there is none of that name. Raises ClusterFailed."""
        with _failing(f"write the webhook {name}"):
            try:
                found = await self._api.get(WebhookConfiguration, name)
                hooks = [
                    {**one, "clientConfig": {**one["clientConfig"], "caBundle": bundle}} for one in found["webhooks"]
                ]
                if hooks != found["webhooks"]:
                    patch = {"webhooks": hooks}
                    await self._api.patch(WebhookConfiguration, name, patch, patch_type=PatchType.MERGE)
            except ApiError as exc:
                if exc.status.code == GONE:
                    return False
                raise
        return True

    async def post_event(self, body: Mapping[str, Any]) -> None:
        """An event that cannot be posted is missed by nobody but the reader."""
        try:
            await self._api.create(Event(**body))
        except (ApiError, httpx2.HTTPError) as exc:
            log.warning("cannot post an event: %s", exc)


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Failures of the API server become ClusterFailed."""
    try:
        yield
    except ApiError as exc:
        raise ClusterFailed(f"cannot {what}: {exc}") from exc
    except httpx2.HTTPError as exc:
        raise ClusterFailed(f"cannot {what}: {exc!r}") from exc
