"""The management socket of a sandbox: HTTP for kata-runtime, kata-monitor and whoever reads metrics.

It is for root alone, as its directory is. Paths and answers: facts cli.md section 2.5; metrics: facts metrics.md.
What the guest adds to the metrics is bounded, and kept to the names that are the guest's.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from katapod.host.memory_use import family
from katapod.host.process_metrics import (
    CallTimes,
    family_text,
    netdev_rows,
    process_text,
    standard_process_text,
)
from katapod.model.errors import KatapodError, NotFound
from katapod.model.layout import GUEST_SHARE
from katapod.rpc.http import HttpError, Request, Response, serve_http
from katapod.rpc.pb import agent_pb2
from katapod.rpc.status import RpcError, StatusCode
from katapod.sandbox.agent_link import AGENT_PORT
from katapod.sandbox.lifecycle import Sandbox
from katapod.sandbox.management_door import bound_listener

__all__ = [
    "Caller",
    "Managed",
    "ManagedSandbox",
    "guest_metrics",
    "management_socket",
    "metrics_text",
    "serve_management",
]

log = logging.getLogger(__name__)

GUEST_LIMIT_S = 5.0
GUEST_TEXT_MAX = 1 << 20  # bytes of the guest's metrics
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_GUEST_LINE = re.compile(r"(?:# (?:HELP|TYPE) )?(?:kata_(?:agent|guest)|process|go)_[a-zA-Z0-9_]*[{ ].*")


class Caller(Protocol):
    """Part of AgentClient."""

    async def call(self, method: str, request: Any, timeout_s: float | None = ...) -> Any: ...


class Managed(Protocol):
    """What is needed of a sandbox."""

    @property
    def sandbox_id(self) -> str: ...
    @property
    def agent(self) -> Caller: ...
    @property
    def vmm_pid(self) -> int: ...
    @property
    def virtiofsd_pids(self) -> Sequence[int]: ...
    @property
    def agent_url(self) -> str:
        """vsock://CID:1024; empty where the agent has no address of its own (a serial port)."""

    @property
    def call_times(self) -> Sequence[CallTimes]: ...
    def guest_path(self, volume_path: str) -> str:
        """Where a volume of the host is in the guest. Raises NotFound."""


class ManagedSandbox:
    """A sandbox of this process. `call_times`: histograms that its door keeps of its own calls."""

    def __init__(self, sandbox: Sandbox, call_times: Sequence[CallTimes] = ()) -> None:
        self._sandbox = sandbox
        self.call_times = call_times

    @property
    def sandbox_id(self) -> str:
        return self._sandbox.sandbox_id

    @property
    def agent(self) -> Caller:
        return self._sandbox.agent

    @property
    def vmm_pid(self) -> int:
        return self._sandbox.vm.pid

    @property
    def virtiofsd_pids(self) -> Sequence[int]:
        return family([self._sandbox.share.child.pid])

    @property
    def agent_url(self) -> str:
        cid = self._sandbox.vsock_cid
        return f"vsock://{cid}:{AGENT_PORT}" if cid is not None else ""

    def guest_path(self, volume_path: str) -> str:
        """Its mount in the shared directory, found by what is mounted there: names differ."""
        try:
            wanted = os.stat(volume_path)
            for name in os.listdir(self._sandbox.paths.mounts):
                with contextlib.suppress(FileNotFoundError):  # a container that goes
                    if os.path.samestat(os.stat(self._sandbox.paths.mounts / name), wanted):
                        return f"{GUEST_SHARE}/{name}"
        except OSError as exc:
            raise NotFound(f"cannot find the volume {volume_path}: {exc.strerror}") from exc
        raise NotFound(f"cannot find the volume {volume_path} in sandbox {self.sandbox_id}")


class _Resize(msgspec.Struct, rename={"volume_path": "VolumePath", "size": "Size"}):
    volume_path: str
    size: int


@contextlib.asynccontextmanager
async def management_socket(managed: Managed, path: Path) -> AsyncIterator[None]:
    """Serve on `path`, /run/vc/sbs/SID/shim-monitor.sock, while the block runs. Raises KatapodError."""
    with bound_listener(path) as listener:
        async with serve_management(managed, listener):
            yield


@contextlib.asynccontextmanager
async def serve_management(managed: Managed, listener: socket.socket) -> AsyncIterator[None]:
    """Answer on a listening socket, which is closed when the block ends."""
    server = await serve_http(listener, _Routes(managed).handle)
    try:
        yield
    finally:
        await server.close()


class _Routes:
    def __init__(self, managed: Managed) -> None:
        self._managed = managed
        self._agent_has_metrics = True
        self._routes: dict[str, dict[str, Callable[[Request], Awaitable[Response]]]] = {
            "/metrics": {"GET": self._metrics},
            "/agent-url": {"GET": self._agent_url},
            # both: the Go shim has a GET, the Rust shim a POST
            "/direct-volume/stats": {"GET": self._volume_stats, "POST": self._volume_stats},
            "/direct-volume/resize": {"POST": self._volume_resize},
            "/iptables": {"GET": self._get_iptables, "PUT": self._set_iptables},
            "/ip6tables": {"GET": self._get_iptables, "PUT": self._set_iptables},
            "/policy": {"PUT": self._set_policy},
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
        guest = ""
        if self._agent_has_metrics:
            try:
                answer = await self._call("GetMetrics", agent_pb2.GetMetricsRequest())
                guest = guest_metrics(answer.metrics)
            except RpcError as exc:
                if exc.code in (StatusCode.NOT_FOUND, StatusCode.UNIMPLEMENTED):
                    self._agent_has_metrics = False  # an older agent: it will not learn it
                log.warning("the guest's part of the metrics of %s is missing: %s", self._managed.sandbox_id, exc)
        return Response((own + guest).encode(), content_type=METRICS_TYPE)

    async def _agent_url(self, request: Request) -> Response:
        url = self._managed.agent_url
        if not url:
            raise HttpError(500, f"the agent of {self._managed.sandbox_id} has a serial port, which has no address")
        return Response(url.encode())

    async def _volume_stats(self, request: Request) -> Response:
        volume = request.query.get("path", "")
        if not volume:
            raise HttpError(400, "cannot tell the statistics of a volume: the parameter path is missing")
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

    async def _call(self, method: str, request: Any) -> Any:
        return await self._managed.agent.call(method, request, timeout_s=GUEST_LIMIT_S)


def metrics_text(managed: Managed) -> str:
    """The host's part: owner, QEMU, virtiofsd. Reads /proc."""
    own = os.getpid()
    return "".join(
        [
            process_text("kata_shim", "the shim", [own]),
            *(times.text() for times in managed.call_times),
            standard_process_text("kata_shim", own),
            process_text("kata_hypervisor", "the VMM", [managed.vmm_pid]),
            family_text(
                "kata_hypervisor_netdev",
                "gauge",
                "Interfaces in the VMM's network namespace.",
                netdev_rows(managed.vmm_pid),
            ),
            process_text("kata_virtiofsd", "virtiofsd", managed.virtiofsd_pids),
        ]
    )


def guest_metrics(text: str) -> str:
    """Those lines of the agent's text that are the guest's to say, up to a limit; go_ and process_ get the prefix
    that kata-monitor gives them."""
    kept, size = [], 0
    for line in text.splitlines():
        size += len(line) + 1
        if size > GUEST_TEXT_MAX:
            log.warning("the guest says more than %d bytes of metrics: the rest is left out", GUEST_TEXT_MAX)
            break
        if _GUEST_LINE.fullmatch(line):
            kept.append(re.sub(r"^(# (?:HELP|TYPE) )?(go_|process_)", r"\1kata_agent_\2", line) + "\n")
    return "".join(kept)
