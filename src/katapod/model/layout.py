"""Where things lie on the host: Kata Containers' paths where its users know them, and ours below /var/lib/katapod."""

from pathlib import Path

from msgspec import Struct

__all__ = [
    "CPUS_LOCK",
    "UIDS_LOCK",
    "GUEST_SANDBOX_DIR",
    "GUEST_BUNDLES",
    "GUEST_SHARE",
    "SHM",
    "SANDBOX_MOUNTS",
    "SHARE_TAG",
    "Layout",
    "SandboxPaths",
]

SHARE_TAG = "kataShared"
GUEST_BUNDLES = "/run/kata-containers"  # where the agent has that of each container
GUEST_SHARE = "/run/kata-containers/shared/containers"  # mount point of the share in the guest
SANDBOX_MOUNTS = "sandbox-mounts"  # below the share: what sandbox_bind_mounts names
GUEST_SANDBOX_DIR = "/run/kata-containers/sandbox"
SHM = "/dev/shm"  # noqa: S108 - of a container: shared memory of its sandbox


class SandboxPaths(Struct, frozen=True):
    """The directories of one sandbox. All four are removed with it.

    MID, the machine's id, is SID unless the machine comes from the pool: then it was started under another name.
    """

    state: Path  # /run/vc/sbs/SID: persist.json, lock, control.sock, console.log
    vm: Path  # /run/vc/vm/MID: qmp.sock, qmp2.sock, vhost-fs.sock, pid
    share: Path  # .../sandboxes/MID: mounts (we write), shared (the guest sees), private
    data: Path  # /var/lib/katapod/sandboxes/SID: writable layers, container logs, what can be started again

    @property
    def all(self) -> tuple[Path, ...]:
        """In the order of removal: the state directory last, since it says what there is to remove."""
        return (self.share, self.vm, self.data, self.state)

    @property
    def persist(self) -> Path:
        return self.state / "persist.json"

    @property
    def lock(self) -> Path:
        return self.state / "lock"

    @property
    def devices(self) -> Path:
        return self.state / "devices.json"

    @property
    def devices_lock(self) -> Path:
        """Held by whoever changes the VM's devices, or speaks with its VMM beside the supervisor."""
        return self.state / "devices.lock"

    @property
    def control_socket(self) -> Path:
        return self.state / "control.sock"

    @property
    def exec_socket(self) -> Path:
        """Where `exec` hands over its streams: see supervisor/exec_client.py, which knows the name too."""
        return self.state / "exec.sock"

    @property
    def management_socket(self) -> Path:
        """HTTP: the name is upstream's."""
        return self.state / "shim-monitor.sock"

    @property
    def console_log(self) -> Path:
        return self.state / "console.log"

    @property
    def vmm_log(self) -> Path:
        return self.state / "vmm.log"

    @property
    def layers(self) -> Path:
        """Writable layers of containers: gone when the VM ends."""
        return self.data / "layers"

    def etc(self, container_id: str) -> Path:
        """The container's own hosts and hostname."""
        return self.layers / container_id / "etc"

    @property
    def container_log(self) -> Path:
        """What the container wrote: stays until the container is deleted."""
        return self.data / "container.log"

    @property
    def files(self) -> Path:
        """The writable layer of a container that can be started again: stays until the container is deleted."""
        return self.data / "files"

    @property
    def kept_record(self) -> Path:
        """The record of a container that can be started again, as it was at its last start or end: /run is emptied with
        a start of the host."""
        return self.data / "record.json"

    @property
    def kept_request(self) -> Path:
        """What a container that can be started again was asked for with: see supervisor/kept.py."""
        return self.data / "request.json"

    def spec(self, container_id: str) -> Path:
        """The container's OCI spec as planned: execs take its environment and rights from here."""
        return self.state / f"{container_id}.config.json"

    @property
    def mounts(self) -> Path:
        return self.share / "mounts"

    @property
    def shared(self) -> Path:
        return self.share / "shared"


UIDS_LOCK = Path("/run/vc/uids")
CPUS_LOCK = Path("/run/vc/cpus")
"""Files by whose locks user ids and CPUs are taken: for the whole host, as those are."""


class Layout(Struct, frozen=True):
    """The roots; tests move them, users cannot."""

    state_root: Path = Path("/run/vc/sbs")
    vm_root: Path = Path("/run/vc/vm")
    share_root: Path = Path("/run/kata-containers/shared/sandboxes")
    data_root: Path = Path("/var/lib/katapod/sandboxes")
    image_root: Path = Path("/var/lib/katapod/images")
    volume_root: Path = Path("/var/lib/katapod/volumes")
    guest_image_root: Path = Path("/var/cache/kata-containers")
    proof_file: Path = Path("/var/cache/kata-containers/accelerator.json")

    @property
    def event_log(self) -> Path:
        """What happens to containers: see host/event_log.py. No id begins with a dot."""
        return self.state_root / ".events.log"

    @property
    def starts_lock(self) -> Path:
        """The file by whose locks starts take turns: see host/turns.py."""
        return self.state_root.parent / "starts"

    @property
    def sandbox_roots(self) -> tuple[Path, ...]:
        """Where sandboxes have directories, but for their state. What begins with a dot there is nobody's: see
        host/removal.py."""
        return (self.share_root, self.vm_root, self.data_root)

    def sandbox(self, sandbox_id: str, machine_id: str = "") -> SandboxPaths:
        """The ids were parsed by model.ids: they have no slash and are short enough for socket paths.

        Without `machine_id` (SandboxRecord has it) the machine is taken to have the sandbox's name.
        """
        machine_id = machine_id or sandbox_id
        return SandboxPaths(
            state=self.state_root / sandbox_id,
            vm=self.vm_root / machine_id,
            share=self.share_root / machine_id,
            data=self.data_root / sandbox_id,
        )
