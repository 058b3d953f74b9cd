"""The host's client of the guest agent: a typed interface to `grpc.AgentService` and `grpc.Health`.

Time limits are those of Kata's runtime. All answers come from the guest and are not trusted: the frame limit bounds
their size, and callers treat strings and numbers as data.
"""

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from katapod.rpc.call_times import CallTimes
from katapod.rpc.client import TtrpcClient
from katapod.rpc.pb import agent_pb2, health_pb2, katapod_pb2
from katapod.rpc.pb._load import class_of

if TYPE_CHECKING:
    from katapod.rpc.pb import inspection_pb2

__all__ = [
    "AGENT_SERVICE",
    "GUEST_SERVICE",
    "HEALTH_SERVICE",
    "INSPECTION_SERVICE",
    "REQUEST_TIMEOUT_S",
    "AgentClient",
]

AGENT_SERVICE = "grpc.AgentService"
HEALTH_SERVICE = "grpc.Health"
GUEST_SERVICE = "katapod.Guest"  # implemented by Katapod's agent only
INSPECTION_SERVICE = "katapod.Inspection"  # likewise
REQUEST_TIMEOUT_S = 60.0
LAUNCHES_MAX = 8
"""Process launches in flight per sandbox; further ones queue here, where no time limit applies to them yet. The agent
may run fewer at a time, depending on the guest's CPUs."""
EXIT_STATUS_MAX = 255

log = logging.getLogger(__name__)

_ANSWERS: dict[str, Any] = {
    method.name: class_of(method.output_type)
    for method in agent_pb2.DESCRIPTOR.services_by_name["AgentService"].methods
}


class AgentClient:
    """Calls of the agent protocol over one ttrpc connection."""

    def __init__(self, connection: TtrpcClient, call_times: CallTimes | None = None) -> None:
        """`call_times` counts calls of AgentService, by the full name of the request."""
        self.connection = connection
        self.call_times = call_times
        self._features: frozenset[str] | None = None
        self.launches = asyncio.Semaphore(LAUNCHES_MAX)

    async def call(self, method: str, request: Any, timeout_s: float | None = REQUEST_TIMEOUT_S) -> Any:
        """Call AgentService.`method`; the .proto file determines the type of the response. Raises RpcError."""
        began = time.monotonic()
        try:
            return await self.connection.call(AGENT_SERVICE, method, request, _ANSWERS[method], timeout_s)
        finally:
            if self.call_times is not None:
                self.call_times.observe(request.DESCRIPTOR.full_name, time.monotonic() - began)

    async def check(self, timeout_s: float | None) -> None:
        """Health.Check; None waits indefinitely. Raises RpcError unless the agent is serving."""
        await self.connection.call(
            HEALTH_SERVICE, "Check", health_pb2.CheckRequest(), health_pb2.HealthCheckResponse, timeout_s
        )

    async def features(self) -> frozenset[str]:
        """The extensions of the protocol (katapod.rpc.features) that the agent supports; cached. Raises RpcError."""
        if self._features is None:
            answer = await self.call("GetGuestDetails", agent_pb2.GuestDetailsRequest())
            self._features = frozenset(answer.agent_details.extra_features)
        return self._features

    async def settle(self, *, zero_free_memory: bool, timeout_s: float | None) -> None:
        """Prepare the guest for being saved as a template. Raises RpcError."""
        request = katapod_pb2.SettleRequest(zero_free_memory=zero_free_memory)
        await self.connection.call(GUEST_SERVICE, "Settle", request, katapod_pb2.SettleResponse, timeout_s)

    async def rename(self, sandbox_id: str, hostname: str) -> None:
        """Set the names of a sandbox that was created in advance. Raises RpcError."""
        request = katapod_pb2.RenameRequest(sandbox_id=sandbox_id, hostname=hostname)
        await self.connection.call(
            GUEST_SERVICE, "Rename", request, katapod_pb2.RenameResponse, timeout_s=REQUEST_TIMEOUT_S
        )

    async def trace(self, timeout_s: float) -> list[tuple[str, int, int]]:
        """The agent's latest spans: (name, start, duration), in nanoseconds since the epoch. Raises RpcError."""
        answer = await self.connection.call(
            GUEST_SERVICE, "Trace", katapod_pb2.TraceRequest(), katapod_pb2.TraceResponse, timeout_s
        )
        return [(span.name, span.start_ns, span.duration_ns) for span in answer.spans]

    async def processes(self, container_id: str) -> list[tuple[int, str]]:
        """The processes of a container: (pid in the guest, id of the exec that started it). Raises RpcError:
        UNIMPLEMENTED with upstream's agent."""
        request = katapod_pb2.ProcessesRequest(container_id=container_id)
        answer = await self.connection.call(
            GUEST_SERVICE, "Processes", request, katapod_pb2.ProcessesResponse, timeout_s=REQUEST_TIMEOUT_S
        )
        return [(process.pid, process.exec_id) for process in answer.processes]

    async def connect(self, connection_id: int, address: bytes, port: int, timeout_s: float) -> None:
        """Open a connection to the guest's loopback. Raises RpcError: NOT_FOUND if nothing listens there."""
        request = katapod_pb2.ConnectRequest(connection_id=connection_id, address=address, port=port)
        await self.connection.call(GUEST_SERVICE, "Connect", request, katapod_pb2.ConnectResponse, timeout_s)

    async def receive(self, connection_id: int, size: int) -> bytes:
        """Read from a connection. Blocks; empty bytes mean end of stream. Raises RpcError."""
        request = katapod_pb2.ReceiveRequest(connection_id=connection_id, len=size)
        answer = await self.connection.call(GUEST_SERVICE, "Receive", request, katapod_pb2.ReceiveResponse, None)
        return bytes(answer.data)

    async def send(self, connection_id: int, data: bytes) -> None:
        """Write to a connection. Blocks until all is taken; empty data ends the stream. Raises RpcError."""
        request = katapod_pb2.SendRequest(connection_id=connection_id, data=data)
        await self.connection.call(GUEST_SERVICE, "Send", request, katapod_pb2.SendResponse, None)

    async def disconnect(self, connection_id: int, *, reset: bool, timeout_s: float) -> None:
        """Close a connection; it is not an error if it does not exist. Raises RpcError."""
        request = katapod_pb2.DisconnectRequest(connection_id=connection_id, reset=reset)
        await self.connection.call(GUEST_SERVICE, "Disconnect", request, katapod_pb2.DisconnectResponse, timeout_s)

    async def clock(self, *, step_ns: int = 0, slew_ns: int = 0, other_source: bool = False, timeout_s: float) -> int:
        """Adjust the guest's clock by what is given, and return its time in nanoseconds since the epoch. Raises
        RpcError: UNIMPLEMENTED with upstream's agent."""
        request = katapod_pb2.ClockRequest(step_ns=step_ns, slew_ns=slew_ns, other_source=other_source)
        answer = await self.connection.call(GUEST_SERVICE, "Clock", request, katapod_pb2.ClockResponse, timeout_s)
        return int(answer.time_ns)

    async def let_go(self, *, disk: str = "", mac: str = "") -> None:
        """Have the guest's kernel let go of a disk, by its path, or of an interface. Raises RpcError."""
        request = katapod_pb2.LetGoRequest(disk=disk, hardware_address=mac)
        await self.connection.call(
            GUEST_SERVICE, "LetGo", request, katapod_pb2.LetGoResponse, timeout_s=REQUEST_TIMEOUT_S
        )

    async def take_names(self, address: bytes) -> None:
        """Have queries to this loopback address of the guest wait for `next_query`. Raises RpcError: UNIMPLEMENTED with
        upstream's agent, UNAVAILABLE where the guest's kernel cannot."""
        request = katapod_pb2.TakeNamesRequest(address=address)
        await self.connection.call(
            GUEST_SERVICE, "TakeNames", request, katapod_pb2.TakeNamesResponse, timeout_s=REQUEST_TIMEOUT_S
        )

    async def next_query(self) -> tuple[int, bytes, bool]:
        """Wait for one: (number, DNS message, whether it came by TCP). Raises RpcError."""
        request = katapod_pb2.NextQueryRequest()
        answer = await self.connection.call(GUEST_SERVICE, "NextQuery", request, katapod_pb2.NextQueryResponse, None)
        return int(answer.query_id), bytes(answer.message), bool(answer.stream)

    async def answer_query(self, query_id: int, message: bytes) -> None:
        """Raises RpcError."""
        request = katapod_pb2.AnswerQueryRequest(query_id=query_id, message=message)
        await self.connection.call(
            GUEST_SERVICE, "AnswerQuery", request, katapod_pb2.AnswerQueryResponse, timeout_s=REQUEST_TIMEOUT_S
        )

    async def inspect(self, timeout_s: float) -> "inspection_pb2.InspectResponse":
        """The guest as seen from inside. Raises RpcError: UNIMPLEMENTED with upstream's agent."""
        from katapod.rpc.pb import inspection_pb2  # rarely needed

        request = inspection_pb2.InspectRequest()
        return await self.connection.call(
            INSPECTION_SERVICE, "Inspect", request, inspection_pb2.InspectResponse, timeout_s
        )

    async def write_stdin(self, container_id: str, exec_id: str, data: bytes) -> int:
        """Write to a process; returns the number of bytes written. Empty data closes its stdin."""
        request = agent_pb2.WriteStreamRequest(container_id=container_id, exec_id=exec_id, data=data)
        answer = await self.call("WriteStdin", request, timeout_s=None)
        return int(answer.len)

    async def read_stream(self, method: str, container_id: str, exec_id: str, size: int) -> bytes:
        """ReadStdout or ReadStderr: blocks; empty bytes mean end of stream."""
        request = agent_pb2.ReadStreamRequest(container_id=container_id, exec_id=exec_id, len=size)
        answer = await self.call(method, request, timeout_s=None)
        return bytes(answer.data)

    async def wait_process(self, container_id: str, exec_id: str) -> int:
        """Block until the process ends; returns its exit code, or 128 + signal.

        A number outside 0 to 255, which no process can exit with but a guest can claim, becomes 255: exit events have
        no room for it.
        """
        request = agent_pb2.WaitProcessRequest(container_id=container_id, exec_id=exec_id)
        status = int((await self.call("WaitProcess", request, timeout_s=None)).status)
        if not 0 <= status <= EXIT_STATUS_MAX:
            log.warning("the guest reports exit status %d for process %s: using 255", status, exec_id)
            return EXIT_STATUS_MAX
        return status
