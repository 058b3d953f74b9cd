"""The root file system of a container: where it comes from, and how the guest gets it.

As a disk: a layer of the container's own over the image's disk, plugged into the VM and mounted by the agent. Or
in the shared directory: an overlay on the host, or a directory as it is; there, too, where the VMM has no disks.
"""

from pathlib import Path

from msgspec import Struct

from katapod.host.mounts import bind, mount_overlay
from katapod.host.trace import span
from katapod.model.errors import KatapodError, NotFound
from katapod.model.layout import GUEST_SANDBOX_DIR, GUEST_SHARE, SandboxPaths
from katapod.plan.root_disk import KEPT_MOUNT_OPTIONS, MOUNT_OPTIONS, ROOT_DISK_FSTYPE, root_disk_id
from katapod.rpc.pb import agent_pb2
from katapod.sandbox.lifecycle import Sandbox
from katapod.sandbox.planning import RootDisk

__all__ = ["GuestRootfs", "Rootfs", "close_root_disk", "open_rootfs", "root_disk_of"]


class Rootfs(Struct, frozen=True):
    """Where a root file system comes from: `disk` or, if there is none, `lower`, under a layer of the container's own;
    or, `direct`, `lower` as it is. `own`: this process has mounted `lower`, and the host does not see it. `kept`: the
    layer stays when the sandbox ends, and is taken again."""

    lower: Path
    direct: bool = False
    own: bool = False
    kept: bool = False
    disk: Path | None = None


class GuestRootfs(Struct, frozen=True):
    """What the agent is told: the path of the root, and what it has to mount before."""

    path: str
    storages: tuple[agent_pb2.Storage, ...] = ()

    @property
    def shared(self) -> bool:
        """Whether it is in the shared directory."""
        return self.path.startswith(f"{GUEST_SHARE}/")


async def open_rootfs(sandbox: Sandbox, container_id: str, rootfs: Rootfs) -> GuestRootfs:
    """Bring the root file system to the guest. Undone by container.remove_host_files and close_root_disk.

    Raises VmmRefused, NoSpace, NotFound, KatapodError.
    """
    disk = root_disk_of(sandbox.paths, container_id, rootfs)
    if disk is not None and sandbox.has_disk(disk.disk_id):
        return await _open_root_disk(sandbox, container_id, disk)
    if disk is not None and disk.kept and disk.overlay.exists():
        raise KatapodError(
            f"cannot start {container_id}: its files are on a disk, which this VMM cannot give its guest",
            hint="use the accelerator that it had: kata-runtime inspect shows it",
        )
    layers = sandbox.paths.layers / container_id
    root = sandbox.paths.mounts / container_id / "rootfs"
    if rootfs.direct:
        bind(rootfs.lower, root, own=rootfs.own)
    else:
        lower = layers / "lower"
        bind(rootfs.lower, lower)  # a name of our own: the user's may hold what overlay's options cannot
        written = sandbox.paths.files if rootfs.kept else layers
        mount_overlay(lower, written / "upper", written / "work", root)
    return GuestRootfs(f"{GUEST_SHARE}/{container_id}/rootfs")


def root_disk_of(paths: SandboxPaths, container_id: str, rootfs: Rootfs) -> RootDisk | None:
    """The disk that this root file system comes on; None if it comes in the shared directory."""
    if rootfs.disk is None or rootfs.direct:
        return None
    place = paths.files if rootfs.kept else paths.layers / container_id
    return RootDisk(root_disk_id(container_id), place / "root.qcow2", rootfs.disk, rootfs.kept)


async def _open_root_disk(sandbox: Sandbox, container_id: str, disk: RootDisk) -> GuestRootfs:
    """The disk of a sandbox's first container has been plugged with its machine's other devices."""
    pci_path = sandbox.disk_path(disk.disk_id)
    if not pci_path:
        with span("plug the root disk"):
            pci_path = await sandbox.add_disk(
                disk.disk_id, disk.overlay, read_only=False, base=disk.base, kept=disk.kept
            )
    path = f"{GUEST_SANDBOX_DIR}/layers/{container_id}"
    storage = agent_pb2.Storage(
        driver="blk",
        source=pci_path,
        fstype=ROOT_DISK_FSTYPE,
        mount_point=path,
        options=KEPT_MOUNT_OPTIONS if disk.kept else MOUNT_OPTIONS,
    )
    return GuestRootfs(path, (storage,))


async def close_root_disk(sandbox: Sandbox, container_id: str) -> None:
    """Take the disk of a container out, if it has one; the guest has unmounted it. Raises VmmRefused."""
    try:
        await sandbox.remove_disk(root_disk_id(container_id))
    except NotFound:
        return  # its root file system is in the shared directory, or it was never plugged
