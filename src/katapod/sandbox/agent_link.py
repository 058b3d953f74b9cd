"""What a VM needs of this host that no two may have, and the first contact with its agent, over whichever channel it
has."""

import asyncio
import contextlib
import errno
import os
import socket

from msgspec.structs import replace

from katapod.host.facts import claim_vsock_cid
from katapod.host.jail_uids import held_uid
from katapod.host.vsock import connect_vsock
from katapod.model.layout import UIDS_LOCK
from katapod.rpc.agent import AgentClient
from katapod.rpc.call_times import CallTimes
from katapod.rpc.client import TtrpcClient
from katapod.sandbox.errors import AgentFailed
from katapod.vmm.protocol import Capabilities, Channel, Handed, VirtualMachine
from katapod.vmm.spec import AGENT_PORT_NAME, VmSpec

__all__ = ["AGENT_PORT", "AGENT_PORT_NAME", "claim_channel", "claim_user", "connect_agent"]

AGENT_PORT = 1024  # vsock: where Kata's agent listens
DIAL_PAUSE_S = 0.02
AGENT_CALLS = "kata_shim_agent_rpc_durations_histogram_milliseconds"


def claim_channel(
    spec: VmSpec, given: dict[Handed, int], stack: contextlib.ExitStack | contextlib.AsyncExitStack
) -> VmSpec:
    """The VM with a vsock CID of its own, if it has a vsock; its device joins `given` and is closed by `stack`."""
    if spec.vsock_cid is None:
        return spec
    cid, fd = claim_vsock_cid()
    stack.callback(os.close, fd)
    given[Handed.VSOCK] = fd
    return replace(spec, vsock_cid=cid)


def claim_user(
    spec: VmSpec, capabilities: Capabilities, stack: contextlib.ExitStack | contextlib.AsyncExitStack
) -> VmSpec:
    """The VM with a user of its own, until `stack` is closed, if its VMM runs as one. Raises HostLacks, OSError."""
    return replace(spec, uid=stack.enter_context(held_uid(spec.uids, UIDS_LOCK))) if capabilities.own_user else spec


async def connect_agent(vm: VirtualMachine, spec: VmSpec, peer: str) -> AgentClient:
    """Return a client of the agent, who may not serve yet. The caller closes its connection.

    With a channel of the VMM's nothing is polled: it keeps our first request until the guest opens its end. A vsock
    refuses until the agent listens, so this waits for that. `peer` names the agent in errors.
    """
    sock = vm.take_channel(Channel.AGENT)
    if sock is None:
        assert spec.vsock_cid is not None
        sock = await _dial_vsock(spec.vsock_cid)
    times = CallTimes(AGENT_CALLS, "Latency of calls to the agent, milliseconds.")
    return AgentClient(await TtrpcClient.on_socket(sock, peer), times)


async def _dial_vsock(cid: int) -> socket.socket:
    while True:
        try:
            return await connect_vsock(cid, AGENT_PORT)
        except OSError as exc:
            if exc.errno in (errno.EADDRINUSE, errno.EACCES):  # of our own end: waiting does not help
                raise AgentFailed(f"cannot connect to the agent by vsock: {exc.strerror}") from exc
            await asyncio.sleep(DIAL_PAUSE_S)
