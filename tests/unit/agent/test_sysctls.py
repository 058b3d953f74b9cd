"""Sysctls of the network are written by the agent; all others stay for crun."""

from pathlib import Path

import pytest

from katapod.agent.sysctls import apply_network_sysctls
from katapod.rpc.pb import oci_pb2
from katapod.rpc.status import RpcError


def spec_with(**sysctls: str) -> oci_pb2.Spec:
    spec = oci_pb2.Spec()
    for key, value in sysctls.items():
        spec.Linux.Sysctl[key.replace("__", ".")] = value
    return spec


def test_network_is_written_and_the_rest_stays(tmp_path: Path) -> None:
    (tmp_path / "net/ipv4/conf/eth0.5").mkdir(parents=True)
    for name in ("net/ipv4/ip_forward", "net/ipv4/conf/eth0.5/rp_filter"):
        (tmp_path / name).touch()
    spec = spec_with(net__ipv4__ip_forward="1", kernel__shm_rmid_forced="1")
    spec.Linux.Sysctl["net/ipv4/conf/eth0.5/rp_filter"] = "2"
    apply_network_sysctls(spec, str(tmp_path))
    assert (tmp_path / "net/ipv4/ip_forward").read_text() == "1"
    assert (tmp_path / "net/ipv4/conf/eth0.5/rp_filter").read_text() == "2"
    assert dict(spec.Linux.Sysctl) == {"kernel.shm_rmid_forced": "1"}


@pytest.mark.parametrize("key", ["net.no.such", "net/../kernel/hostname"])
def test_what_is_none_is_refused(tmp_path: Path, key: str) -> None:
    spec = oci_pb2.Spec()
    spec.Linux.Sysctl[key] = "1"
    with pytest.raises(RpcError, match="cannot set the sysctl"):
        apply_network_sysctls(spec, str(tmp_path))
