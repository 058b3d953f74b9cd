"""What is done for a pod's interface, as values."""

import pytest
from msgspec.structs import replace

from katapod.model.network import Address, Interface, InterfaceKind, Interworking, NetworkError, NicRecord
from katapod.plan.network import NetworkSettings, plan_nic, plan_redirect, plan_undo, render_address

ETH0 = Interface(3, "eth0", InterfaceKind.VETH, "02:00:00:00:00:02", 1500, addresses=(Address("10.0.0.2", 24),))
VMTAP = replace(ETH0, name="vmtap", kind=InterfaceKind.TAP)


def test_tcfilter() -> None:
    plan = plan_nic(ETH0, 0, NetworkSettings(), vcpus=1)
    assert plan.describe() == (
        "interface eth0 (veth) by tap0_kata, model tcfilter\n"
        "  tc qdisc add dev eth0 ingress\n"
        "  tc filter add dev eth0 parent ffff: protocol all u32 match u8 0 0 "
        "action mirred egress redirect dev tap0_kata\n"
        "  tc qdisc add dev tap0_kata ingress\n"
        "  tc filter add dev tap0_kata parent ffff: protocol all u32 match u8 0 0 "
        "action mirred egress redirect dev eth0"
    )
    assert plan_undo(plan.record) == plan.tc.undo == ("qdisc del dev eth0 ingress",)


def test_a_queue_for_each_vcpu_and_vhost() -> None:
    plan = plan_nic(ETH0, 1, NetworkSettings(vhost=True), vcpus=2)
    assert (plan.queues, plan.vhost) == (2, True)


def test_rates() -> None:
    plan = plan_nic(ETH0, 0, NetworkSettings(rx_rate=1000, tx_rate=2000), vcpus=1)
    assert [step for step in plan.tc.steps if "root" in step or "class" in step] == [
        "qdisc add dev tap0_kata root handle 1: htb default 2",
        "class add dev tap0_kata parent 1: classid 1:1 htb rate 1000bit ceil 1000bit",
        "class add dev tap0_kata parent 1:1 classid 1:2 htb rate 1000bit ceil 1000bit",
        "qdisc add dev eth0 root handle 1: htb default 2",
        "class add dev eth0 parent 1: classid 1:1 htb rate 2000bit ceil 2000bit",
        "class add dev eth0 parent 1:1 classid 1:2 htb rate 2000bit ceil 2000bit",
    ]
    assert plan_undo(plan.record) == plan.tc.undo == ("qdisc del dev eth0 ingress", "qdisc del dev eth0 root")
    only_rx = plan_nic(ETH0, 0, NetworkSettings(rx_rate=1000), vcpus=1)
    assert plan_undo(only_rx.record) == only_rx.tc.undo == ("qdisc del dev eth0 ingress",)


def test_other_models_leave_tc_alone() -> None:
    macvtap = plan_nic(ETH0, 0, NetworkSettings(model=Interworking.MACVTAP), vcpus=1)
    assert macvtap.tc.steps == plan_undo(macvtap.record) == ()
    assert macvtap.record == NicRecord("eth0", "tap0_kata", "macvtap", ETH0.mac, ("10.0.0.2/24",))
    none = plan_nic(ETH0, 0, NetworkSettings(model=Interworking.NONE), vcpus=1)
    assert none.tc.steps == plan_undo(none.record) == ()
    assert none.tap == "tap0_kata"


def test_a_tap_is_used_directly_and_never_deleted() -> None:
    plan = plan_nic(VMTAP, 0, NetworkSettings(), vcpus=4)
    assert (plan.direct, plan.tap, plan.queues, plan.record.tap) == (True, "vmtap", 1, "")
    assert plan_nic(replace(VMTAP, multi_queue=True), 0, NetworkSettings(), vcpus=4).queues == 4


@pytest.mark.parametrize(
    ("interface", "settings"),
    [(VMTAP, NetworkSettings(rx_rate=1)), (ETH0, NetworkSettings(Interworking.MACVTAP, tx_rate=1))],
)
def test_rates_where_there_is_nothing_to_shape(interface: Interface, settings: NetworkSettings) -> None:
    with pytest.raises(NetworkError, match="cannot limit the rate"):
        plan_nic(interface, 0, settings, vcpus=1)


def test_an_ipvlan_has_no_macvtap() -> None:
    ipvlan = replace(ETH0, kind=InterfaceKind.IPVLAN)
    assert plan_nic(ipvlan, 0, NetworkSettings(), vcpus=1).tc.steps
    with pytest.raises(NetworkError, match="cannot put a macvtap on eth0: it is an ipvlan"):
        plan_nic(ipvlan, 0, NetworkSettings(Interworking.MACVTAP), vcpus=1)


@pytest.mark.parametrize(
    ("model", "steps"),
    [
        (Interworking.TCFILTER, ["filter replace dev tap0_kata parent ffff:"]),
        (Interworking.MACVTAP, ["qdisc replace dev tap0_kata clsact", "filter replace dev tap0_kata egress"]),
        (Interworking.NONE, ["qdisc replace dev tap0_kata clsact", "filter replace dev tap0_kata ingress"]),
    ],
)
def test_frames_held_to_the_addresses(model: Interworking, steps: list[str]) -> None:
    plan = plan_nic(ETH0, 0, NetworkSettings(model, held=True), vcpus=1)
    assert [step.partition(" protocol")[0] for step in plan.hold] == steps
    assert "protocol all prio 1 handle 1 bpf da bytecode '" in plan.hold[-1]
    assert plan.hold[-1] in plan.describe()
    assert plan_nic(ETH0, 0, NetworkSettings(model), vcpus=1).hold == ()


def test_a_tap_of_the_pods_own_cannot_be_held() -> None:
    with pytest.raises(NetworkError, match="cannot hold vmtap to its addresses"):
        plan_nic(VMTAP, 0, NetworkSettings(held=True), vcpus=1)


def test_a_redirect_to_itself_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="to itself"):
        plan_redirect("eth0", "eth0")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (Address("10.9.0.2", 24, broadcast="10.9.0.255"), "10.9.0.2/24 broadcast 10.9.0.255"),
        (Address("10.9.0.2", 32, peer="10.9.5.5"), "10.9.0.2 peer 10.9.5.5/32"),
        (Address("10.9.0.2", 24, scope=253, label="eth0:1", metric=7), "10.9.0.2/24 label eth0:1 scope 253 metric 7"),
        (Address("fd00::2", 64, flags=0x220), "fd00::2/64 noprefixroute nodad preferred_lft 0"),
    ],
)
def test_an_address_is_given_back_as_it_was(address: Address, words: str) -> None:
    assert render_address(address) == words


def test_a_tap_that_the_vmm_opens_by_name_has_one_queue_and_an_owner() -> None:
    plan = plan_nic(ETH0, 0, NetworkSettings(vhost=True, tap_owner=1234), vcpus=4)
    assert (plan.owner, plan.queues, plan.vhost) == (1234, 1, False)
    assert plan.describe().startswith("interface eth0 (veth) by tap0_kata, model tcfilter, opened by user 1234\n")
    handed_over = plan_nic(ETH0, 0, NetworkSettings(), vcpus=1)
    assert handed_over.owner is None
    assert (plan.tc, plan.record) == (handed_over.tc, handed_over.record)


def test_what_cannot_be_opened_by_name() -> None:
    with pytest.raises(NetworkError, match="cannot put a macvtap on eth0: this VMM opens taps by their names only"):
        plan_nic(ETH0, 0, NetworkSettings(model=Interworking.MACVTAP, tap_owner=1234), vcpus=1)
    several = replace(VMTAP, multi_queue=True)
    with pytest.raises(NetworkError, match="cannot attach vmtap: it is a tap with several queues"):
        plan_nic(several, 0, NetworkSettings(tap_owner=1234), vcpus=1)
    assert plan_nic(VMTAP, 0, NetworkSettings(tap_owner=1234), vcpus=1).direct
