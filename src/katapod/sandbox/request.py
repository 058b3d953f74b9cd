"""What an entry point asks for when it wants a sandbox: all that is known before anything is acquired."""

from msgspec import Struct, field

from katapod.model import oci
from katapod.model.ids import ContainerId
from katapod.model.net_flags import NetworkRequest
from katapod.model.record import SandboxRecord
from katapod.model.sizing import ContainerLimits
from katapod.plan.container_spec import DEFAULT_SHM_BYTES

__all__ = ["SandboxRequest", "wants_32bit"]


class SandboxRequest(Struct, frozen=True):
    """One sandbox. Of `netns` and `network` at most one is given; without either the guest has loopback only.

    `limits`: of its first container; None: that one is not counted (a pause container). `announced` and `cpus_asked`
    as in size_pod. `fixed`: no container comes after the first, so that the VM is sized for that one alone.
    `netns`: path of the network namespace that an engine has made; empty: one is made, which the engine fills later.
    `network`: one is made, and attached by CNI plugins.
    `cgroups_path`: linux.cgroupsPath of an OCI spec; None: the sandbox stays in the cgroups of who starts it.
    `again`: the record of a sandbox of that id which is at rest, and is started again; None: the id is to be free.
    `dns`: lines of a resolv.conf, for the guest itself. `accelerator`: empty for the configuration's.
    `block_devices`: its first container has some of the host. `volumes`: what is mounted into it, of which some may be
    direct volumes. `shares`: there may be files of the host for its containers, other than disks. `programs_32bit`: its
    first container has the personality of a 32-bit machine.
    """

    sandbox_id: ContainerId
    hostname: str
    limits: ContainerLimits | None = None
    announced: ContainerLimits | None = None
    cpus_asked: int = 0
    fixed: bool = False
    netns: str | None = None
    network: NetworkRequest | None = None
    cgroups_path: str | None = None
    dns: tuple[str, ...] = ()
    shm_size_bytes: int = DEFAULT_SHM_BYTES
    accelerator: str = ""
    block_devices: bool = False
    volumes: tuple[str, ...] = ()
    shares: bool = True
    programs_32bit: bool = False
    auto_remove: bool = True  # with its end; else record and log stay
    is_pod: bool = False  # its first container is only the pod's own
    again: SandboxRecord | None = None
    restart: str = "no"  # the policy, for the record
    labels: dict[str, str] = field(default_factory=dict)


def wants_32bit(spec: oci.Spec) -> bool:
    """Whether its programs are to be told that they run on a 32-bit machine."""
    personality = spec.linux.personality
    return personality is not None and personality.domain == "LINUX32"
