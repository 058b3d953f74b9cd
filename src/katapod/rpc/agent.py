"""The host's client of the guest agent: one typed door to `grpc.AgentService` and `grpc.Health`.

Time limits follow facts agent-protocol.md section 1. Whatever comes back was written by the guest:
sizes are bounded by the frame limit, and callers treat texts and numbers as data.
"""

from typing import Any

from katapod.rpc.client import TtrpcClient
from katapod.rpc.pb import agent_pb2, health_pb2, katapod_pb2
from katapod.rpc.pb._load import class_of

__all__ = ["AGENT_SERVICE", "GUEST_SERVICE", "HEALTH_SERVICE", "REQUEST_TIMEOUT_S", "AgentClient"]

AGENT_SERVICE = "grpc.AgentService"
HEALTH_SERVICE = "grpc.Health"
GUEST_SERVICE = "katapod.Guest"  # only our own agent has it
REQUEST_TIMEOUT_S = 60.0

_ANSWERS: dict[str, Any] = {
    method.name: class_of(method.output_type)
    for method in agent_pb2.DESCRIPTOR.services_by_name["AgentService"].methods
}


class AgentClient:
    """Calls of the agent protocol over one ttrpc connection."""

    def __init__(self, connection: TtrpcClient) -> None:
        self.connection = connection

    async def call(self, method: str, request: Any, timeout_s: float | None = REQUEST_TIMEOUT_S) -> Any:
        """Call AgentService.`method`; the answer's type follows from the .proto file. Raises RpcError."""
        return await self.connection.call(AGENT_SERVICE, method, request, _ANSWERS[method], timeout_s)

    async def check(self, timeout_s: float | None) -> None:
        """Health.Check; None waits for ever. Raises RpcError unless the agent serves."""
        await self.connection.call(
            HEALTH_SERVICE, "Check", health_pb2.CheckRequest(), health_pb2.HealthCheckResponse, timeout_s
        )

    async def settle(self, *, zero_free_memory: bool) -> None:
        """Have the guest get ready to be saved as a template. Raises RpcError."""
        request = katapod_pb2.SettleRequest(zero_free_memory=zero_free_memory)
        await self.connection.call(
            GUEST_SERVICE, "Settle", request, katapod_pb2.SettleResponse, timeout_s=REQUEST_TIMEOUT_S
        )

    async def rename(self, sandbox_id: str, hostname: str) -> None:
        """Give a sandbox that was created in advance its names. Raises RpcError."""
        request = katapod_pb2.RenameRequest(sandbox_id=sandbox_id, hostname=hostname)
        await self.connection.call(
            GUEST_SERVICE, "Rename", request, katapod_pb2.RenameResponse, timeout_s=REQUEST_TIMEOUT_S
        )

    async def trace(self, timeout_s: float) -> list[tuple[str, int, int]]:
        """What the agent did lately: (name, start, duration), nanoseconds since the epoch. Raises RpcError."""
        answer = await self.connection.call(
            GUEST_SERVICE, "Trace", katapod_pb2.TraceRequest(), katapod_pb2.TraceResponse, timeout_s
        )
        return [(span.name, span.start_ns, span.duration_ns) for span in answer.spans]

    async def write_stdin(self, container_id: str, exec_id: str, data: bytes) -> int:
        """Write to a process; returns the bytes taken. Empty data closes its stdin."""
        request = agent_pb2.WriteStreamRequest(container_id=container_id, exec_id=exec_id, data=data)
        answer = await self.call("WriteStdin", request, timeout_s=None)
        return int(answer.len)

    async def read_stream(self, method: str, container_id: str, exec_id: str, size: int) -> bytes:
        """ReadStdout or ReadStderr: blocks; empty bytes mean end of stream."""
        request = agent_pb2.ReadStreamRequest(container_id=container_id, exec_id=exec_id, len=size)
        answer = await self.call(method, request, timeout_s=None)
        return bytes(answer.data)

    async def wait_process(self, container_id: str, exec_id: str) -> int:
        """Block until the process ends; returns its exit code, or 128 + signal."""
        request = agent_pb2.WaitProcessRequest(container_id=container_id, exec_id=exec_id)
        return int((await self.call("WaitProcess", request, timeout_s=None)).status)
