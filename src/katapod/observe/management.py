"""The management socket of a sandbox: HTTP for kata-runtime, kata-monitor and whoever reads metrics.

It is for root alone, as its directory is. Paths and answers: those of Kata's shim
management server; metrics: Kata Containers, docs/design/kata-2-0-metrics.md.
What the guest adds to the metrics is bounded, and kept to the names that are the guest's.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from katapod.host.descendants import descendants
from katapod.model.errors import KatapodError, NotFound
from katapod.model.guest_metrics import guest_summary
from katapod.model.json_text import encode_json
from katapod.model.layout import GUEST_SHARE
from katapod.model.summary import GuestSummary, SandboxSummary
from katapod.observe.guest_figures import AgentCalls, GuestFigures
from katapod.observe.memory_use import cpu_seconds, family, is_disk_server
from katapod.observe.process_metrics import (
    METRICS_TYPE,
    call_times_text,
    family_text,
    netdev_rows,
    process_text,
    standard_process_text,
)
from katapod.observe.process_use import network_bytes, process_use
from katapod.rpc.call_times import CallTimes
from katapod.rpc.http import HttpError, Request, Response, serve_http
from katapod.rpc.pb import agent_pb2
from katapod.rpc.status import RpcError
from katapod.sandbox.agent_link import AGENT_PORT
from katapod.sandbox.lifecycle import Sandbox
from katapod.tasks import Background

if TYPE_CHECKING:
    from katapod.observe.live import HasFacts

__all__ = [
    "ObservedAgent",
    "ObservedSandbox",
    "ManagedSandbox",
    "metrics_text",
    "serve_management",
    "summary_of",
]

log = logging.getLogger(__name__)

GUEST_LIMIT_S = 5.0
OVERHEAD_WINDOW_S = 1.0


class ObservedAgent(AgentCalls, Protocol):
    """Part of AgentClient."""

    async def inspect(self, timeout_s: float) -> Any: ...


class ObservedSandbox(Protocol):
    """What is needed of a sandbox."""

    @property
    def sandbox_id(self) -> str: ...
    @property
    def agent(self) -> ObservedAgent: ...
    @property
    def vm(self) -> "HasFacts": ...
    @property
    def vmm_pid(self) -> int: ...
    @property
    def vmm_helpers(self) -> Sequence[int]:
        """Processes that the VMM has started."""

    @property
    def virtiofsd_pids(self) -> Sequence[int]: ...
    @property
    def disk_server_pids(self) -> Sequence[int]:
        """Who serves the VMM's disks, if it does not do that itself."""

    @property
    def agent_url(self) -> str:
        """vsock://CID:1024; empty where the agent has no address of its own (a serial port)."""

    @property
    def call_times(self) -> Sequence[CallTimes]: ...
    @property
    def vcpus(self) -> int: ...
    @property
    def mem_mib(self) -> int: ...
    @property
    def has_network(self) -> bool: ...
    async def overhead(self, seconds: float) -> tuple[float, int]:
        """What the host spends beside the containers: CPU, percent of one, over `seconds`; memory, bytes.

        Raises KatapodError.
        """

    def guest_path(self, volume_path: str) -> str:
        """Where a volume of the host is in the guest. Raises NotFound."""

    async def resize_volume(self, volume_path: str, size: int) -> None:
        """Tell the guest of a direct volume's new size, bytes. Raises KatapodError."""


class ManagedSandbox:
    """A sandbox of this process. `call_times`: histograms that its entry point keeps of its own calls."""

    def __init__(self, sandbox: Sandbox, call_times: Sequence[CallTimes] = ()) -> None:
        self._sandbox = sandbox
        own = sandbox.agent.call_times
        self.call_times = (*call_times, own) if own is not None else call_times
        self._virtiofsd: list[int] = []
        self._disk_server: list[int] | None = None  # it does not change: all disks are there before the guest

    @property
    def sandbox_id(self) -> str:
        return self._sandbox.sandbox_id

    @property
    def agent(self) -> ObservedAgent:
        return self._sandbox.agent

    @property
    def vm(self) -> "HasFacts":
        return self._sandbox.vm

    @property
    def vmm_pid(self) -> int:
        return self._sandbox.vm.pid

    @property
    def vmm_helpers(self) -> Sequence[int]:
        return list(descendants(self.vmm_pid))[1:] if self.vmm_pid else []

    @property
    def disk_server_pids(self) -> Sequence[int]:
        if self._disk_server is None and self.vmm_pid:
            self._disk_server = [pid for pid in descendants(os.getpid()) if is_disk_server(pid)]
        return self._disk_server or []

    @property
    def virtiofsd_pids(self) -> Sequence[int]:
        """Looked for again when one has ended: that reads all of /proc."""
        if not self._virtiofsd or not all(os.path.exists(f"/proc/{pid}") for pid in self._virtiofsd):
            pid = self._sandbox.share.pid
            self._virtiofsd = family([pid]) if pid is not None else []
        return self._virtiofsd

    @property
    def vcpus(self) -> int:
        return self._sandbox.guest_vcpus

    @property
    def mem_mib(self) -> int:
        return self._sandbox.guest_mem_mib

    @property
    def has_network(self) -> bool:
        return self._sandbox.network is not None

    async def overhead(self, seconds: float) -> tuple[float, int]:
        from katapod.observe.overhead import container_use, memory_of

        record = self._sandbox.record
        before, cpu, began = await container_use(self._sandbox.agent, record), self._cpu_seconds(), time.monotonic()
        await asyncio.sleep(seconds)
        after, spent = await container_use(self._sandbox.agent, record), self._cpu_seconds() - cpu
        within = (after.cpu_ns - before.cpu_ns) / 1e9
        percent = 100 * (spent - within) / (time.monotonic() - began)
        memory = await asyncio.to_thread(memory_of, record)
        return percent, memory.total_kib * 1024 - after.memory_bytes

    def _cpu_seconds(self) -> float:
        pids = {os.getpid(), *descendants(self.vmm_pid), *self.virtiofsd_pids, *self.disk_server_pids}
        return cpu_seconds(pids, with_ended=True)

    @property
    def agent_url(self) -> str:
        cid = self._sandbox.vsock_cid
        return f"vsock://{cid}:{AGENT_PORT}" if cid is not None else ""

    def guest_path(self, volume_path: str) -> str:
        """A direct volume's mount; or the one in the shared directory, found by what is mounted there: names differ."""
        if path := self._sandbox.direct_volumes.guest_path(volume_path):
            return path
        try:
            wanted = os.stat(volume_path)
            for name in os.listdir(self._sandbox.paths.mounts):
                with contextlib.suppress(FileNotFoundError):  # a container that goes
                    if os.path.samestat(os.stat(self._sandbox.paths.mounts / name), wanted):
                        return f"{GUEST_SHARE}/{name}"
        except OSError as exc:
            raise NotFound(f"cannot find the volume {volume_path}: {exc.strerror}") from exc
        raise NotFound(f"cannot find the volume {volume_path} in sandbox {self.sandbox_id}")

    async def resize_volume(self, volume_path: str, size: int) -> None:
        await self._sandbox.direct_volumes.resize(self._sandbox, volume_path, size)


class _Resize(msgspec.Struct, rename={"volume_path": "VolumePath", "size": "Size"}):
    volume_path: str
    size: int


@contextlib.asynccontextmanager
async def serve_management(managed: ObservedSandbox, listener: socket.socket) -> AsyncIterator[None]:
    """Answer on a listening socket, which is closed when the block ends."""
    routes = _Routes(managed)
    server = await serve_http(listener, routes.handle)
    try:
        yield
    finally:
        await server.close()
        await routes.close()


class _Routes:
    def __init__(self, managed: ObservedSandbox) -> None:
        self._managed = managed
        self._figures = GuestFigures(managed)
        self._overhead: tuple[float, int] | None = None
        self._background = Background()
        self._routes: dict[str, dict[str, Callable[[Request], Awaitable[Response]]]] = {
            "/metrics": {"GET": self._metrics},
            "/summary": {"GET": self._summary},
            "/agent-url": {"GET": self._agent_url},
            # both: the Go shim has a GET, the Rust shim a POST
            "/direct-volume/stats": {"GET": self._volume_stats, "POST": self._volume_stats},
            "/direct-volume/resize": {"POST": self._volume_resize},
            "/iptables": {"GET": self._get_iptables, "PUT": self._set_iptables},
            "/ip6tables": {"GET": self._get_iptables, "PUT": self._set_iptables},
            "/policy": {"PUT": self._set_policy},
            "/inspect": {"GET": self._inspect},  # ours
        }

    async def handle(self, request: Request) -> Response:
        methods = self._routes.get(request.path)
        if methods is None:
            raise HttpError(404, "URL NOT FOUND")
        handler = methods.get(request.method)
        if handler is None:
            allowed = ", ".join(methods)
            raise HttpError(501, f"cannot {request.method} {request.path}: it takes {allowed}")
        try:
            return await handler(request)
        except (RpcError, KatapodError) as exc:
            raise HttpError(500, str(exc)) from exc

    async def _metrics(self, request: Request) -> Response:
        own = await asyncio.to_thread(metrics_text, self._managed)
        guest = await self._figures.text(whole="whole" in request.query)
        text = own + self._overhead_text() + guest
        if not self._background:
            self._background.start(self._watch_overhead(), name="overhead")
        return Response(text.encode(), content_type=METRICS_TYPE)

    def _overhead_text(self) -> str:
        """As it was after the last scrape: it takes a second to see."""
        if self._overhead is None:
            return ""
        cpu, memory = self._overhead
        name = "kata_shim_pod_overhead"
        what = "of the host's processes, without the containers', in the second after the last scrape."
        return family_text(f"{name}_cpu", "gauge", f"CPU {what} Percent of one.", [({}, cpu)]) + family_text(
            f"{name}_memory_in_bytes", "gauge", f"Memory {what}", [({}, memory)]
        )

    async def _watch_overhead(self) -> None:
        try:
            self._overhead = await self._managed.overhead(OVERHEAD_WINDOW_S)
        except (OSError, KatapodError) as exc:
            self._overhead = None
            log.debug("the overhead of %s is not known: %s", self._managed.sandbox_id, exc)

    async def close(self) -> None:
        await self._figures.close()
        await self._background.close()

    async def _summary(self, request: Request) -> Response:
        guest = None
        if "guest" in request.query:
            guest = guest_summary(await self._figures.text(whole=True))
        return Response(msgspec.json.encode(summary_of(self._managed, guest)), content_type="application/json")

    async def _agent_url(self, request: Request) -> Response:
        url = self._managed.agent_url
        if not url:
            raise HttpError(500, f"the agent of {self._managed.sandbox_id} has a serial port, which has no address")
        return Response(url.encode())

    async def _volume_stats(self, request: Request) -> Response:
        volume = request.query.get("path", "")
        if not volume:
            raise HttpError(400, "cannot get the statistics of a volume: the parameter path is missing")
        wanted = agent_pb2.VolumeStatsRequest(volume_guest_path=self._guest_path(volume))
        found = await self._call("GetVolumeStats", wanted)
        shown = {
            "usage": [
                {"available": each.available, "total": each.total, "used": each.used, "unit": each.unit}
                for each in found.usage
            ],
            "volume_condition": {
                "abnormal": found.volume_condition.abnormal,
                "message": found.volume_condition.message,
            },
        }
        return Response(json.dumps(shown).encode(), content_type="application/json")

    async def _volume_resize(self, request: Request) -> Response:
        try:
            asked = msgspec.json.decode(request.body, type=_Resize)
        except msgspec.DecodeError as exc:
            raise HttpError(400, f"cannot resize a volume: {exc}") from exc
        if not 0 < asked.size < 2**64:
            raise HttpError(400, f"cannot resize a volume to {asked.size} bytes")
        wanted = agent_pb2.ResizeVolumeRequest(volume_guest_path=self._guest_path(asked.volume_path), size=asked.size)
        await self._managed.resize_volume(asked.volume_path, asked.size)
        await self._call("ResizeVolume", wanted)
        return Response()

    def _guest_path(self, volume: str) -> str:
        try:
            return self._managed.guest_path(volume)
        except NotFound as exc:
            raise HttpError(404, str(exc)) from exc

    async def _get_iptables(self, request: Request) -> Response:
        wanted = agent_pb2.GetIPTablesRequest(is_ipv6=request.path == "/ip6tables")
        return Response((await self._call("GetIPTables", wanted)).data)

    async def _set_iptables(self, request: Request) -> Response:
        wanted = agent_pb2.SetIPTablesRequest(is_ipv6=request.path == "/ip6tables", data=request.body)
        return Response((await self._call("SetIPTables", wanted)).data)

    async def _set_policy(self, request: Request) -> Response:
        try:
            policy = request.body.decode()
        except UnicodeDecodeError as exc:
            raise HttpError(400, "cannot set the policy: it is not UTF-8") from exc
        await self._call("SetPolicy", agent_pb2.SetPolicyRequest(policy=policy))
        return Response()

    async def _inspect(self, request: Request) -> Response:
        """LiveFacts as JSON: what only we can ask the VMM and the agent."""
        from katapod.observe.live import live_facts

        found = await live_facts(self._managed.vm, self._managed.agent, self._managed.agent_url)
        return Response(encode_json(found), content_type="application/json")

    async def _call(self, method: str, request: Any) -> Any:
        return await self._managed.agent.call(method, request, timeout_s=GUEST_LIMIT_S)


def metrics_text(managed: ObservedSandbox) -> str:
    """The host's part: supervisor, VMM, virtiofsd. Reads /proc."""
    own = os.getpid()
    return "".join(
        [
            process_text("kata_shim", "the shim", [own]),
            *(call_times_text(times) for times in managed.call_times),
            standard_process_text("kata_shim", own),
            process_text("kata_hypervisor", "the VMM", [managed.vmm_pid], managed.vmm_helpers),
            family_text(
                "kata_hypervisor_netdev",
                "gauge",
                "Interfaces in the VMM's network namespace.",
                netdev_rows(managed.vmm_pid),
            ),
            process_text("kata_virtiofsd", "virtiofsd", managed.virtiofsd_pids),
            process_text("kata_storage_daemon", "qemu-storage-daemon", managed.disk_server_pids),
        ]
    )


def summary_of(managed: ObservedSandbox, guest: GuestSummary | None = None) -> SandboxSummary:
    """The host's part is read from /proc, in a millisecond: not worth a thread."""
    vmm = process_use([managed.vmm_pid], managed.vmm_helpers)
    disks, virtiofsd, supervisor = (
        process_use(pids) for pids in (managed.disk_server_pids, managed.virtiofsd_pids, [os.getpid()])
    )
    received, sent = network_bytes(managed.vmm_pid) if managed.has_network else (None, None)
    return SandboxSummary(
        sandbox_id=managed.sandbox_id,
        at=time.monotonic(),
        vcpus=managed.vcpus,
        guest_bytes=managed.mem_mib << 20,
        vmm_state=vmm.state,
        # the shared memory of virtiofsd and who serves disks is the guest's, seen once more
        memory={
            "guest": vmm.shared,
            "vmm": vmm.private + disks.private,
            "virtiofsd": virtiofsd.private,
            "supervisor": supervisor.private + supervisor.shared,
        },
        cpu={"vmm": vmm.cpu_s + disks.cpu_s, "virtiofsd": virtiofsd.cpu_s, "supervisor": supervisor.cpu_s},
        disk_read=vmm.read + disks.read + virtiofsd.read,
        disk_written=vmm.written + disks.written + virtiofsd.written,
        net_received=received,
        net_sent=sent,
        guest=guest,
    )
