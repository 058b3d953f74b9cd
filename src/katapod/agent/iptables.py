"""GetIPTables and SetIPTables, if the guest image has the programs."""

from __future__ import annotations

import os

from katapod.agent import program
from katapod.rpc.pb import agent_pb2
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.agent.sandbox import Agent

__all__ = ["get_iptables", "set_iptables"]

LIMIT_S = 10.0


def _find(name: str) -> str:
    try:
        return program.find_program(name)
    except program.ProgramError as exc:
        raise RpcError(StatusCode.UNIMPLEMENTED, f"{exc}: this guest image has no packet filter") from exc


async def get_iptables(agent: Agent, request: agent_pb2.GetIPTablesRequest) -> agent_pb2.GetIPTablesResponse:
    path = _find("ip6tables-save" if request.is_ipv6 else "iptables-save")
    try:
        text = await program.run(agent.loop, ["iptables-save"], LIMIT_S, path=path)
    except program.ProgramError as exc:
        raise RpcError(StatusCode.INTERNAL, f"cannot read the packet filter: {exc}") from exc
    return agent_pb2.GetIPTablesResponse(data=text.encode())


async def set_iptables(agent: Agent, request: agent_pb2.SetIPTablesRequest) -> agent_pb2.SetIPTablesResponse:
    path = _find("ip6tables-restore" if request.is_ipv6 else "iptables-restore")
    rules = os.memfd_create("rules")
    output = os.memfd_create("output")
    try:
        os.write(rules, request.data)
        os.lseek(rules, 0, os.SEEK_SET)
        await program.run(
            agent.loop, ["iptables-restore", "--wait", "5"], LIMIT_S, stdio=(rules, output, output), path=path
        )
        return agent_pb2.SetIPTablesResponse(data=os.pread(output, 64 * 1024, 0))
    except program.ProgramError as exc:
        said = os.pread(output, 4096, 0).decode(errors="replace").strip()
        raise RpcError(StatusCode.INTERNAL, f"cannot set the packet filter: {said or exc}") from exc
    finally:
        os.close(rules)
        os.close(output)
