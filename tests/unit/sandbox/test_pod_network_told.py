"""What a guest is told of its network: of the NICs that it has."""

from pathlib import Path
from typing import Any, cast

from katapod.model.network import Interface, InterfaceKind
from katapod.plan.network import NetworkSettings, plan_nic
from katapod.rpc.agent import AgentClient
from katapod.sandbox.network import PodNetwork


class Agent:
    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    async def call(self, method: str, request: Any) -> None:
        self.asked.append((method, request))

    def interfaces(self) -> list[tuple[str, str]]:
        told = [(one.interface.name, one.interface.devicePath) for name, one in self.asked if name == "UpdateInterface"]
        self.asked.clear()
        return told


async def test_a_nic_that_another_process_has_unplugged_is_not_told_of() -> None:
    interfaces = [Interface(2 + n, f"eth{n}", InterfaceKind.VETH, f"02:00:00:00:00:0{n}", 1500) for n in range(2)]
    nics = [plan_nic(each, number, NetworkSettings(), vcpus=1) for number, each in enumerate(interfaces)]
    paths = {0: "02/1f", 1: "02/1e"}
    network = PodNetwork(Path("/none"), 1, NetworkSettings(), 1, lambda record: None, nics=nics, guest_paths=paths)
    agent = Agent()
    await network.tell_guest(cast(AgentClient, agent))
    assert agent.interfaces() == [("eth0", "02/1f"), ("eth1", "02/1e")]
    network.forget_plugged(0)
    await network.tell_guest(cast(AgentClient, agent), tuple(nics))
    assert agent.interfaces() == [("eth1", "02/1e")]
    assert [nic.tap for nic in network.record.nics] == ["tap0_kata", "tap1_kata"], "what is there is undone in the end"
