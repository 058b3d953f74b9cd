"""Whose frames are held to their addresses."""

from pathlib import Path

import msgspec
import pytest

from katapod.host.facts import HostFacts
from katapod.model.attachment import AttachmentRecord
from katapod.model.cni import NetworkConfig, PluginConfig
from katapod.model.config import Config
from katapod.model.layout import Layout
from katapod.model.record import SandboxRecord
from katapod.model.sizing import ContainerLimits
from katapod.plan.bridge import plan_bridge
from katapod.plan.virtiofsd import VirtiofsdImplementation
from katapod.sandbox.planning import plan_sandbox, size_for
from katapod.vmm.spec import Accelerator

FACTS = HostFacts(cpus=4, mem_mib=8192, kvm=True, vhost_vsock=False, boot_id="b", kernel_release="6")
BUILT_IN = plan_bridge("10.186.0.0/16", firewall=False, publish=True)
UNCHECKED = NetworkConfig("lab", "1.0.0", (PluginConfig("bridge", settings={"macspoofchk": False}),))
CHECKED = NetworkConfig("lab", "1.0.0", (PluginConfig("bridge", settings={"macspoofchk": True}),))


@pytest.mark.parametrize(
    ("spoof_check", "network", "held"),
    [
        ("run", BUILT_IN, True),
        ("run", CHECKED, True),
        ("run", UNCHECKED, False),
        ("run", None, False),
        ("all", BUILT_IN, True),
        ("all", UNCHECKED, False),
        ("all", None, True),
        ("none", BUILT_IN, False),
        ("none", None, False),
    ],
)
def test_who_is_held(spoof_check: str, network: NetworkConfig | None, held: bool) -> None:
    default = Config()
    config = msgspec.structs.replace(default, katapod=msgspec.structs.replace(default.katapod, spoof_check=spoof_check))
    attachment = (
        AttachmentRecord(config=network, netns="/run/netns/x", plugin_dirs=(), host_netns="")
        if network is not None
        else None
    )
    plan = plan_sandbox(
        SandboxRecord("c1", created_at=0.0, supervisor_pid=2, boot_id="", attachment=attachment),
        config,
        FACTS,
        Layout(),
        accelerator=Accelerator.TCG,
        implementation=VirtiofsdImplementation.C,
        size=size_for(config, FACTS, (ContainerLimits(),)),
        hostname="c1",
        shm_size_bytes=1 << 20,
        netns=Path("/run/netns/x"),
    )
    assert plan.network.held is held
