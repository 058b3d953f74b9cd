"""KVM's speed: what it is is the host's, but it is told or it is not, and nothing stays open."""

import os

import pytest

from katapod.host.kvm_speed import instructions_a_second


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("device", ["/dev/kvm", "/dev/null", "/no/such/device"])
def test_it_is_told_or_not(device: str) -> None:
    before = descriptors()
    speed = instructions_a_second(device)
    assert descriptors() == before
    if device == "/dev/kvm" and os.access(device, os.R_OK | os.W_OK):
        assert speed is None or speed > 1000
    else:
        assert speed is None
