"""What only the supervisor of a sandbox can find out of it: the answers of its VMM and of the guest's agent.

Each has a limit of time, and one that does not answer costs the other nothing.
"""

from typing import Any, Protocol

from katapod.model import inspection as facts
from katapod.model.inspection import LiveFacts, Missing
from katapod.rpc.status import RpcError, StatusCode
from katapod.sandbox.agent_link import AGENT_PORT_NAME
from katapod.tasks import together

__all__ = ["InspectableAgent", "HasFacts", "live_facts", "parse_guest"]

LIMIT_S = 5.0  # for all that is asked of one of them
ENTRIES_MAX = 512
TEXT_MAX = 512


class HasFacts(Protocol):
    """Part of VirtualMachine."""

    async def facts(self, limit_s: float) -> tuple[facts.Hypervisor | None, list[Missing]]: ...


class InspectableAgent(Protocol):
    """Part of AgentClient."""

    async def inspect(self, timeout_s: float) -> Any: ...


async def live_facts(vm: HasFacts, agent: InspectableAgent, agent_url: str) -> LiveFacts:
    """Ask both, side by side. Raises nothing that the sandbox can cause."""
    (hypervisor, no_hypervisor), (guest, no_guest) = await together(vm.facts(LIMIT_S), _ask_guest(agent))
    channel = facts.Channel(kind="vsock", address=agent_url)
    if not agent_url:
        channel = facts.Channel(kind="serial port", address=AGENT_PORT_NAME)
    missing = (*no_hypervisor, *no_guest)
    return LiveFacts(hypervisor=hypervisor, guest=guest, channel=channel, missing=missing)


async def _ask_guest(agent: InspectableAgent) -> tuple[facts.GuestFacts | None, list[Missing]]:
    try:
        return parse_guest(await agent.inspect(LIMIT_S)), []
    except RpcError as exc:
        why = exc.message
        if exc.code is StatusCode.UNIMPLEMENTED:
            why = "the guest's agent does not tell: it has no such call"
        return None, [Missing("guest", why)]


def _text(text: str) -> str:
    return text[:TEXT_MAX]


def parse_guest(said: Any) -> facts.GuestFacts:
    """From the agent's InspectResponse, cut to our own limits: the guest may not keep to them."""
    lists = (said.modules, said.mounts, said.processes, said.units, said.links, said.routes)
    return facts.GuestFacts(
        kernel=_text(said.kernel),
        kernel_build=_text(said.kernel_build),
        kernel_parameters=said.kernel_parameters[: 8 * TEXT_MAX],
        agent=_text(said.agent),
        init=_text(said.init),
        hostname=_text(said.hostname),
        uptime_s=said.uptime_s if 0 <= said.uptime_s < 2**40 else 0.0,
        cpus=said.cpus,
        memory_total=said.memory_total,
        memory_free=said.memory_free,
        memory_available=said.memory_available,
        modules=tuple(facts.KernelModule(_text(one.name), one.size, one.used) for one in said.modules[:ENTRIES_MAX]),
        mounts=tuple(
            facts.GuestMount(_text(one.source), _text(one.target), _text(one.fstype), _text(one.options))
            for one in said.mounts[:ENTRIES_MAX]
        ),
        processes=tuple(
            facts.GuestProcess(
                pid=one.pid,
                parent=one.parent,
                command=_text(one.command),
                state=_text(one.state),
                rss=one.rss,
                container=_text(one.container),
            )
            for one in said.processes[:ENTRIES_MAX]
        ),
        units=tuple(
            facts.Unit(_text(one.name), _text(one.load), _text(one.active), _text(one.sub), _text(one.what))
            for one in said.units[:ENTRIES_MAX]
        ),
        links=tuple(_link(one) for one in said.links[:ENTRIES_MAX]),
        routes=tuple(
            facts.GuestRoute(
                destination=_text(one.destination),
                gateway=_text(one.gateway),
                device=_text(one.device),
                source=_text(one.source),
            )
            for one in said.routes[:ENTRIES_MAX]
        ),
        cut=said.cut or any(len(each) > ENTRIES_MAX for each in lists),
    )


def _link(said: Any) -> facts.GuestLink:
    return facts.GuestLink(
        name=_text(said.name),
        mac=_text(said.mac),
        mtu=said.mtu,
        up=said.up,
        addresses=tuple(_text(address) for address in said.addresses[:32]),
        counters=facts.Counters(
            said.rx_bytes, said.rx_packets, said.tx_bytes, said.tx_packets, said.rx_dropped, said.tx_dropped
        ),
    )
