"""The end of a sandbox: the call DestroySandbox."""

from __future__ import annotations

import os

from katapod.agent import log
from katapod.agent.containers import destroy
from katapod.agent.namespaces import drop_namespaces

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.agent.sandbox import Agent
    from katapod.rpc.pb import agent_pb2

__all__ = ["destroy_sandbox"]


async def destroy_sandbox(agent: Agent, request: agent_pb2.DestroySandboxRequest) -> None:
    """Kill and unmount everything. `main` exits when the response has been sent."""
    for container in list(agent.containers.values()):
        await destroy(agent, container)
    drop_namespaces(agent.shared_namespaces)
    agent.storages.release_all()
    os.sync()
    log.info(f"sandbox {agent.sandbox_id} destroyed")
    agent.sandbox_id = ""
    agent.finished.set()
