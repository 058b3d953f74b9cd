"""Rules that keep the host's loopback from bridges."""

import pytest

from katapod.host.loopback_guard import bridges_behind
from katapod.kernel.netlink import Link
from katapod.model.network import Interface, InterfaceKind
from katapod.plan.loopback_guard import guard_changes, guard_rules

SHOWN = "-P PREROUTING ACCEPT\n-P OUTPUT ACCEPT\n"
OURS = "\n".join(guard_rules("kata0"))


def test_each_bridge_gets_its_rules_ahead_of_others() -> None:
    assert guard_changes(SHOWN, ["kata0", "kata0"], ["lo", "kata0"]).splitlines() == [
        "*raw",
        "-I PREROUTING 1 -s 127.0.0.0/8 -i kata0 -m comment --comment katapod-loopback -j DROP",
        "-I PREROUTING 1 -d 127.0.0.0/8 -i kata0 -m comment --comment katapod-loopback -j DROP",
        "COMMIT",
    ]


@pytest.mark.parametrize("shown", [SHOWN + OURS, SHOWN + OURS.replace("katapod-loopback", '"katapod-loopback"')])
def test_nothing_to_do(shown: str) -> None:
    assert guard_changes(shown, ["kata0"], ["lo", "kata0"]) == ""
    assert guard_changes(shown, [], ["lo", "kata0"]) == ""
    assert guard_changes(SHOWN + "-A PREROUTING -i gone0 -j DROP", [], ["lo"]) == ""


def test_what_is_stale_or_twice_goes() -> None:
    assert guard_changes(SHOWN + OURS, [], ["lo"]).splitlines() == [
        "*raw",
        *(rule.replace("-A", "-D") for rule in guard_rules("kata0")),
        "COMMIT",
    ]
    twice = guard_changes(f"{SHOWN}{OURS}\n{OURS}", ["kata0"], ["kata0"]).splitlines()
    assert twice[1:-1] == [rule.replace("-A", "-D") for rule in guard_rules("kata0")]


def link(index: int, name: str, kind: str = "", peer: int = 0, master: int = 0) -> Link:
    return Link(index, name, 1500, b"", 0, peer=peer, master=master, kind=kind)


def test_the_bridge_behind_a_veth() -> None:
    links = [link(4, "cni0", "bridge"), link(7, "veth1", "veth", peer=3, master=4), link(8, "cali1", "veth", peer=5)]
    links += [link(9, "vrf0", "vrf"), link(10, "veth2", "veth", peer=6, master=9)]

    def behind(index: int, peer: int, kind: InterfaceKind = InterfaceKind.VETH) -> list[str]:
        return bridges_behind([Interface(index, "eth0", kind, "", 1500, peer_index=peer)], links)

    assert behind(3, 7) == ["cni0"]
    assert behind(5, 8) == behind(6, 10) == behind(1, 99) == []
    assert behind(2, 7) == [], "another's end of that number, in another namespace"
    assert behind(3, 7, InterfaceKind.MACVLAN) == []
