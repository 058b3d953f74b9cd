"""The containers of one VM, as OCI commands ask for them: create, start, kill, delete and the rest.

Every method of Containers takes a connection and its message, and raises OciError, KatapodError or OSError.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from katapod.host.container_cgroup import (
    container_cgroups,
    made_cgroups,
    make_container_cgroups,
    remove_container_cgroups,
)
from katapod.host.named_netns import netns_path
from katapod.host.own_mounts import in_host_mounts
from katapod.host.proxy_mounts import Volume, add_volumes, proxy_mounts
from katapod.host.state import StateStore
from katapod.model import oci
from katapod.model.annotations import PodAnnotations, parse_annotations
from katapod.model.config import Config
from katapod.model.errors import KatapodError
from katapod.model.mount_options import Access, parse_access
from katapod.oci import wire
from katapod.oci.connection import Connection
from katapod.oci.container import OciContainer
from katapod.oci.errors import NOT_RUNNING, OciError, does_not_exist, not_stopped
from katapod.oci.execs import Execs
from katapod.oci.processes import ProcessStreams, ProxyLink
from katapod.oci.records import Record
from katapod.plan.cgroup import path_of_container
from katapod.rpc.pb import agent_pb2
from katapod.sandbox.bundle import read_bundle
from katapod.sandbox.engine_bundle import (
    carried_spec,
    container_plan,
    limits_of,
    netns_of,
    sandbox_request,
    take_network,
)
from katapod.sandbox.opening import open_sandbox
from katapod.sandbox.pod import Pod
from katapod.sandbox.task import watch_oom
from katapod.tasks import Background, beside, end_tasks, finish

__all__ = ["Containers"]

log = logging.getLogger(__name__)

LoadConfig = Callable[[Mapping[str, str]], Config]
KILL_GRACE_S = 3.0  # of a guest that was told to kill a container; Podman gives up after five


class Containers:
    def __init__(self, root: str, sandbox_id: str, store: StateStore, load_config: LoadConfig) -> None:
        self._root = root
        self._sandbox_id = sandbox_id
        self._store = store
        self._load_config = load_config
        self._all: dict[str, OciContainer] = {}
        self._creating = 0
        self._pod: Pod | None = None
        self._lock = asyncio.Lock()
        self._background = Background()
        self._execs = Execs(self._background)
        self._watch: set[asyncio.Task[None]] = set()

    @property
    def empty(self) -> bool:
        """Whether nothing is left to be asked for."""
        return not self._all and not self._creating

    def _find(self, message: wire.Message) -> OciContainer:
        container = self._all.get(str(message["id"]))
        if container is None:
            raise does_not_exist(str(message["id"]))
        return container

    # create

    async def create(self, connection: Connection, message: wire.Message) -> None:
        """Undone if the command ends meanwhile."""
        streams = ProcessStreams(connection.take_fds(1 if message["terminal"] else 3), terminal=message["terminal"])
        self._creating += 1
        try:
            await self._create(connection, message, streams)
        except BaseException:
            streams.close()
            raise
        finally:
            self._creating -= 1
            if not self._all and not self._creating:
                await self._close_pod()

    async def _create(self, connection: Connection, message: wire.Message, streams: ProcessStreams) -> None:
        container_id, bundle = str(message["id"]), Path(message["bundle"])
        spec, guarded = carried_spec(read_bundle(bundle))
        if guarded:
            log.warning("%s gets no devices of the host", container_id)
        about = parse_annotations(spec.annotations, container_id)
        path = path_of_container(container_id, spec.linux.cgroups_path)
        record = Record(self._root, container_id)
        places = container_cgroups(path)
        state = record.read_as_is() | {"cgroups": made_cgroups(places)}
        record.write(state)  # before they are made
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(asyncio.to_thread, remove_container_cgroups, state["cgroups"])
            opening = self._pod_for(spec, about, path)
            pod = await _unless_gone(connection, opening)
            netns = str(netns_of(spec) or netns_path(pod.sandbox.sandbox_id))
            status = in_host_mounts(lambda: os.stat(netns))
            state["netns"] = f"{status.st_dev}:{status.st_ino}"
            state["members"] = make_container_cgroups(places)
            mounts = proxy_mounts(Path(spec.root.path))
            undo.callback(os.close, mounts)
            place = {"netns": netns, "mounts": f"/proc/{os.getpid()}/fd/{mounts}", "cgroups": state["members"]}
            await connection.say(place)
            told = await connection.hear()
            proxy = ProxyLink(int(told["pid"]), connection.take_fds(1)[0])
            undo.push_async_callback(_end_proxy, proxy)
            state["pid"] = proxy.pid
            plan = container_plan(container_id, spec, about, pod.config, bundle=bundle, own_rootfs=False)
            making = pod.create_container(replace(plan, host_pid=proxy.pid), limits_of(spec, about))
            made = await _unless_gone(connection, making)
            add_volumes(mounts, _volumes_of(spec))
            container = OciContainer(made, record, state, proxy, streams)
            container.mark("created")
            undo.pop_all()
        os.close(mounts)  # its proxy is in there
        self._all[container_id] = container
        listen = proxy.listen(lambda number: self._signalled(container, number), lambda: self._proxy_ended(container))
        container.listening = self._background.start(listen, name=f"proxy-{container_id}")

    async def _pod_for(self, spec: oci.Spec, about: PodAnnotations, cgroup: str) -> Pod:
        async with self._lock:
            if self._pod is None:
                # below the container's own cgroup: what engines read of that is then the whole VM's
                labels = {"oci.root": self._root}
                request = sandbox_request(self._sandbox_id, spec, about, cgroups_path=f"{cgroup}/vm", labels=labels)
                config = self._load_config(spec.annotations)
                config = replace(config, runtime=replace(config.runtime, sandbox_cgroup_only=True))
                pod = self._pod = await open_sandbox(request, config, self._store)
                self._watch = {
                    self._background.start(self._watch_death(pod), name="watch-death"),
                    self._background.start(watch_oom(pod.sandbox, pod.containers), name="watch-oom"),
                }
            return self._pod

    # start and end

    async def start(self, connection: Connection, message: wire.Message) -> None:
        container = self._find(message)
        if container.status != "created" or container.starting:
            raise OciError(f"cannot start a container that is {container.status}")
        container.starting = True
        try:
            await take_network(container.made)
            stdin, stdout, stderr = container.streams.open()
            with contextlib.suppress(KatapodError):  # before the program looks
                await container.resize()
            await container.made.start()
        except BaseException:
            container.starting = False
            await finish(self._end_created(container, signal.SIGKILL), name="end-unstarted")
            raise
        container.mark("running")
        following = container.follow(stdin, stdout, stderr, self._stopped)
        container.following = self._background.start(following, name=f"follow-{container.id}")
        await container.made.hooks.started(container.proxy.pid)

    async def _stopped(self, container: OciContainer, status: int) -> None:
        """Called once for each that was started, when its streams have been carried to their end."""
        container.mark("stopped")
        await self._execs.end(container)
        container.proxy.exit(status)
        self._close_if_idle()

    async def _end_created(self, container: OciContainer, number: int) -> None:
        """End one that was never started: nothing waits for its process."""
        try:
            with contextlib.suppress(KatapodError):
                await container.made.kill(signal.SIGKILL, everyone=True)
        finally:
            container.mark("stopped")
            container.streams.close()
            container.proxy.die(number)
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        """End the VM once nothing runs in it any more, nor is to be started."""
        if not self._creating and all(each.status == "stopped" for each in self._all.values()):
            self._background.start(self._close_alone(), name="close-pod")

    async def _close_alone(self) -> None:
        try:
            await self._close_pod()
        except KatapodError as exc:
            log.error("%s", exc)

    async def _close_pod(self) -> None:
        """End the VM unless somebody has come who needs it. Idempotent; after a failure the next call continues. Raises
        KatapodError."""
        async with self._lock:
            pod = self._pod
            if pod is None or self._creating or any(each.status != "stopped" for each in self._all.values()):
                return
            await end_tasks(self._watch)
            await pod.close()
            self._pod = None

    async def _watch_death(self, pod: Pod) -> None:
        error = await asyncio.shield(pod.sandbox.death)
        log.error("sandbox %s has died: %s", self._sandbox_id, error)
        for container in list(self._all.values()):
            if container.following is not None:  # which sees it as well
                await asyncio.wait({container.following})
            elif container.status != "stopped":
                await self._end_created(container, signal.SIGKILL)

    async def end(self) -> None:
        """End all that runs."""
        for container in list(self._all.values()):
            if container.status != "stopped":
                container.status = "stopped"
                container.proxy.die(signal.SIGKILL)
        try:
            await self._close_alone()
        finally:
            for container in list(self._all.values()):
                with contextlib.suppress(OciError):
                    container.mark("stopped")
            await self._background.close()

    # signals

    async def kill(self, connection: Connection, message: wire.Message) -> None:
        container = self._find(message)
        number = int(message["signal"])
        if container.status == "stopped" or container.has_ended:
            if message.get("all"):  # as runc: engines clean up so after a container without a PID namespace
                return
            raise OciError(NOT_RUNNING)
        await self._kill(container, number, everyone=bool(message.get("all")))

    async def _kill(self, container: OciContainer, number: int, *, everyone: bool = False) -> None:
        if number == 0:
            return
        if container.status == "created" and not container.starting:
            if number not in _HARMLESS:
                await self._end_created(container, number)
            return
        if container.has_ended:
            return
        await container.made.kill(number, everyone=everyone or number == signal.SIGKILL)
        if number == signal.SIGKILL and not container.insisting:
            container.insisting = True
            self._background.start(self._insist(container), name=f"insist-{container.id}")

    async def _insist(self, container: OciContainer) -> None:
        """A guest that hangs does not kill. Engines wait for the proxy's end, and not for long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KILL_GRACE_S):
                await container.stopped.wait()
                return
        log.error("the guest did not kill %s within %g s", container.id, KILL_GRACE_S)
        if container.following is not None:
            await end_tasks({container.following})

    async def _signalled(self, container: OciContainer, number: int) -> None:
        """Somebody has sent a signal to the proxy, which stands for the container's process."""
        if container.status == "stopped":
            return
        with contextlib.suppress(KatapodError):
            if number == signal.SIGWINCH and container.made.process.terminal:
                await container.resize()
            else:
                await self._kill(container, number)

    async def _proxy_ended(self, container: OciContainer) -> None:
        """It was killed; what it stood for goes with it."""
        if container.status == "stopped":
            return
        log.info("the proxy of %s was killed", container.id)
        with contextlib.suppress(KatapodError):
            await self._kill(container, signal.SIGKILL)

    async def pause(self, connection: Connection, message: wire.Message) -> None:
        container = self._find(message)
        if container.status != "running":
            raise OciError(f"cannot pause container {container.id}: {NOT_RUNNING}, it is {container.status}")
        await container.made.pause()
        container.mark("paused")

    async def resume(self, connection: Connection, message: wire.Message) -> None:
        container = self._find(message)
        if container.status != "paused":
            raise OciError(f"cannot resume container {container.id}: container not paused")
        await container.made.resume()
        container.mark("running")

    # what is asked of a container that runs

    async def exec(self, connection: Connection, message: wire.Message) -> None:
        container = self._find(message)
        if container.status not in ("running", "paused"):
            raise OciError(f"cannot exec in container {container.id}: {NOT_RUNNING}")
        if container.status == "paused" and not message.get("ignore-paused"):
            raise OciError("cannot exec a container that is paused")
        await self._execs.start(connection, message, container)

    async def update(self, connection: Connection, message: wire.Message) -> None:
        """The sandbox is resized before the container's limits are raised."""
        container = self._find(message)
        if container.status == "stopped" or self._pod is None:
            raise OciError(NOT_RUNNING)
        resources = oci.parse_resources(str(message["resources"]).encode(), f"the resources for {container.id}")
        spec = container.made.plan.spec
        changed = replace(spec, linux=replace(spec.linux, resources=resources))
        limits = limits_of(changed, parse_annotations(spec.annotations, container.id))
        if limits is not None:
            await self._pod.resize_for(container.id, limits)
        await container.made.update(resources)

    async def processes(self, connection: Connection, message: wire.Message) -> wire.Message:
        """The proxies of its processes, and the processes in the guest as (pid, proxy of the exec or 0)."""
        container = self._find(message)
        if container.status == "stopped":
            return {"pids": [], "guest": []}
        sandbox = container.made.sandbox
        found = await sandbox.guard(sandbox.agent.processes(container.id))
        proxies = {each.guest.exec_id: each.proxy.pid for each in container.execs}
        guest = [(pid, proxies.get(exec_id, 0)) for pid, exec_id in found]
        return {"pids": [container.proxy.pid, *proxies.values()], "guest": guest}

    async def stats(self, connection: Connection, message: wire.Message) -> wire.Message:
        from katapod.oci.stats import runc_stats

        container = self._find(message)
        if container.status not in ("running", "paused"):
            raise OciError(NOT_RUNNING)
        sandbox = container.made.sandbox
        request = agent_pb2.StatsContainerRequest(container_id=container.id)
        found: Any = await sandbox.guard(sandbox.agent.call("StatsContainer", request))
        return {"data": runc_stats(found)}

    # delete

    async def delete(self, connection: Connection, message: wire.Message) -> wire.Message:
        """`last` in the answer: this process ends, too.

        One that was created and not started is killed without force as well, as runc does.
        """
        container = self._find(message)
        if container.status != "stopped":
            if container.status != "created" and not message.get("force"):
                raise not_stopped(container.id, container.status)
            await self._kill(container, signal.SIGKILL)
            await container.stopped.wait()
        async with container.deleting:
            if container.id in self._all:
                await finish(self._remove(container), name=f"remove-{container.id}")
        return {"last": self.empty}

    async def _remove(self, container: OciContainer) -> None:
        if container.following is not None:
            await asyncio.wait({container.following})
        pod = self._pod
        others = [each for each in self._all.values() if each is not container and each.status != "stopped"]
        if not others and not self._creating:
            await self._close_pod()
        elif pod is not None:
            await pod.remove_container(container.id)
        await container.made.hooks.stopped()
        await container.close()
        await asyncio.to_thread(remove_container_cgroups, container.state["cgroups"])
        container.record.remove()
        del self._all[container.id]


def _volumes_of(spec: oci.Spec) -> list[Volume]:
    return [
        Volume(mount.source, mount.destination, parse_access(mount.options) is not Access.WRITABLE)
        for mount in spec.mounts
        if oci.is_bind(mount)
    ]


async def _unless_gone(connection: Connection, work: Any) -> Any:
    """The result of `work`, unless the command that waits for it ends first: nobody would know of it. Raises Gone."""
    async with (
        beside(work, name="work", may_fail=True) as working,
        beside(connection.wait_gone(), name="gone") as gone,
    ):
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise wire.Gone("the command has gone")
        return working.result()


async def _end_proxy(proxy: ProxyLink) -> None:
    proxy.die(signal.SIGKILL)
    proxy.close()


_HARMLESS = frozenset(
    {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}
    | {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
)
"""Signals whose default action does not end a process. Source: signal(7)."""
