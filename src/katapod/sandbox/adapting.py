"""A machine that was made ahead becomes a sandbox's own: it gets what it lacks, and what no two machines may share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from msgspec.structs import replace

from katapod.host.trace import span
from katapod.rpc.pb import agent_pb2
from katapod.sandbox.guard import guarded
from katapod.sandbox.machine import (
    Machine,
    answer_of,
    attach_pod_network,
    begin_call,
    enter_rest,
    plug_rest,
    reseed,
    set_clock,
    shm_storage,
)
from katapod.sandbox.plugged_memory import until_plugged
from katapod.tasks import beside, together
from katapod.vmm.devices import blocks_of

if TYPE_CHECKING:
    from katapod.sandbox.network import PodNetwork
    from katapod.sandbox.planning import SandboxPlan
    from katapod.sandbox.release import ReleaseStack
    from katapod.sandbox.start_record import StartRecord

__all__ = ["adapt_machine", "roused"]


@contextlib.asynccontextmanager
async def roused(machine: Machine, plan: SandboxPlan) -> AsyncIterator[asyncio.Task[None] | None]:
    """Let a machine that stands still, started for `plan`, run again beside the block, which gets to know what for;
    reseeded. None, and it stands on, where its VMM plugs devices while it stands.

    The task raises VmmRefused, VmmLinkBroken, RpcError.
    """
    if plan.vmm.capabilities(plan.vm).plugs_standing:
        yield None
        return
    async with beside(_rouse(machine), name="rouse", may_fail=True) as task:
        await asyncio.sleep(0)  # what the block does first may not wait for anything
        yield task


async def _rouse(machine: Machine) -> None:
    with span("wake the machine", "guest"):
        await machine.vm.run()
        await reseed(machine.agent)


async def adapt_machine(
    machine: Machine,
    made_for: SandboxPlan,
    plan: SandboxPlan,
    networks: ReleaseStack,
    stack: ReleaseStack,
    note: StartRecord,
    rousing: asyncio.Task[None] | None,
) -> Machine:
    """Make a machine that stands still, or is `roused`, started for one plan, the machine of another, and let it run.

    It gets what it lacks, names, and once more random numbers and a time of its own; memory may be `resizing` still.
    The network's release goes to `networks`, which outlives the VMM. Raises AgentFailed, VmmRefused, KatapodError.
    """
    vm, death, sandbox_id = machine.vm, machine.death, plan.record.sandbox_id
    owner = machine.spec.uid if plan.vmm.capabilities(plan.vm).taps_by_name else None
    plan = replace(plan, network=replace(plan.network, tap_owner=owner))
    devices, more_mib = machine.devices, blocks_of(plan.vm.mem_mib - machine.mem_mib)
    network = await guarded(attach_pod_network(plan, note, networks), death, sandbox_id)
    enter_rest(plan, network, devices)
    dimms = devices.enter_memory(machine.mem_mib, more_mib)
    note(devices=devices.next_record())
    if rousing is not None:
        await guarded(answer_of(rousing), death, sandbox_id)
    with span("plug devices"):
        plugged = vm.expect_memory(len(devices.table.dimms) - 1)
        await guarded(plug_rest(plan, network, devices, dimms), death, sandbox_id)
        if rousing is None:
            await guarded(vm.run(), death, sandbox_id)
    with span("make it the sandbox's own"):
        if rousing is None:
            await guarded(reseed(machine.agent), death, sandbox_id)
        await guarded(_wake_as(machine, made_for, plan, network), death, sandbox_id)
    return replace(
        machine,
        mem_mib=machine.mem_mib + max(0, more_mib),
        network=network,
        resizing=await begin_call(until_plugged(plugged, more_mib), stack, name="until-plugged")
        if more_mib > 0
        else None,
    )


async def _wake_as(machine: Machine, made_for: SandboxPlan, plan: SandboxPlan, network: PodNetwork | None) -> None:
    agent = machine.agent
    if network is not None:
        await network.tell_guest(agent)
    await together(set_clock(agent), agent.rename(plan.record.sandbox_id, plan.hostname[:64]))
    if plan.shm_size_bytes != made_for.shm_size_bytes:
        request = agent_pb2.UpdateEphemeralMountsRequest(storages=[shm_storage(plan)])
        await agent.call("UpdateEphemeralMounts", request)
