"""What User-mode Linux is told of its network interfaces."""

import pytest

from katapod.vmm.devices import Nic
from katapod.vmm.errors import VmmRefused
from katapod.vmm.uml.nics import nic_option, plug_request, unplug_request

NIC = Nic(1, "02:00:00:00:00:02", 3, "tap1_kata", 9000)


def test_a_nic_on_the_command_line() -> None:
    assert nic_option(NIC) == "vec1:transport=tap,ifname=tap1_kata,mac=02:00:00:00:00:02,mtu=9000,gro=1"


def test_a_nic_while_the_guest_runs() -> None:
    assert plug_request(NIC) == f"config {nic_option(NIC)}"
    assert unplug_request(NIC) == "remove vec1"


@pytest.mark.parametrize("tap", ["", "a b", "a,mtu=1", "a=b", 'a"'])
def test_a_name_that_would_be_more_of_an_option(tap: str) -> None:
    with pytest.raises(VmmRefused, match="cannot attach the tap"):
        nic_option(Nic(0, NIC.mac, 0, tap))


@pytest.mark.parametrize("mac", ["", "02:00:00:00:00", "02:00:00:00:00:02,vec=0", "zz:00:00:00:00:02"])
def test_a_mac_address_that_is_none(mac: str) -> None:
    with pytest.raises(VmmRefused, match="no MAC address"):
        nic_option(Nic(0, mac, 0, "tap0_kata"))
