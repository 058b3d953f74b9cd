"""Direct volumes of a sandbox: each a disk of the VM, plugged for its first container, out with its last."""

import asyncio
import contextlib
import os
import stat
from pathlib import Path
from typing import Protocol

from msgspec import Struct, field

from katapod.host.direct_volumes import mark_volume, read_volume, size_of_device, unmark_volume
from katapod.host.state import StateStore
from katapod.model import oci
from katapod.model.direct_volume import MountInfo, volume_name
from katapod.model.errors import KatapodError, NotFound
from katapod.model.layout import GUEST_SANDBOX_DIR
from katapod.rpc.pb import agent_pb2, types_pb2

__all__ = ["DirectVolumes"]


class TakesDisks(Protocol):
    """Part of lifecycle.Sandbox."""

    @property
    def sandbox_id(self) -> str: ...
    @property
    def store(self) -> StateStore: ...
    async def add_disk(self, disk_id: str, path: Path, *, read_only: bool, host_device: bool) -> str: ...
    async def remove_disk(self, disk_id: str) -> None: ...
    async def resize_disk(self, disk_id: str, size: int) -> None: ...


class _Volume(Struct):
    info: MountInfo
    disk_id: str
    guest_path: str
    pci_path: str
    users: set[str] = field(default_factory=set)  # containers


class DirectVolumes:
    """By their paths on the host."""

    def __init__(self) -> None:
        self._volumes: dict[str, _Volume] = {}
        self._lock = asyncio.Lock()
        self._number = 0

    def guest_path(self, path: str) -> str:
        """Where the volume of this path, or of this device, is mounted in the guest; empty if there is none."""
        for volume_path, volume in self._volumes.items():
            if path in (volume_path, volume.info.device):
                return volume.guest_path
        return ""

    async def open(
        self, sandbox: TakesDisks, container_id: str, spec: oci.Spec
    ) -> tuple[dict[str, str], tuple[agent_pb2.Storage, ...]]:
        """Plug those that the container mounts; what fails half-way is undone by close().

        Returns the guest's paths by mount destination, and what the agent has to mount before.
        Raises SpecError, NotFound, InvalidState (another sandbox has it), VmmRefused, KatapodError.
        """
        sources: dict[str, str] = {}
        storages: dict[str, agent_pb2.Storage] = {}
        for mount in spec.mounts:
            if not oci.is_bind(mount):
                continue
            async with self._lock:
                volume = self._volumes.get(mount.source) or await self._plug(sandbox, mount.source)
                if volume is None:
                    continue
                volume.users.add(container_id)
            sources[mount.destination] = volume.guest_path
            storages[volume.guest_path] = _storage(volume)
        return sources, tuple(storages.values())

    async def _plug(self, sandbox: TakesDisks, path: str) -> _Volume | None:
        info = read_volume(sandbox.store.layout, path)
        if info is None:
            return None
        try:
            kind = os.stat(info.device).st_mode
        except OSError as exc:
            raise NotFound(f"cannot use {info.device} of the direct volume {path}: {exc.strerror}") from exc
        if not stat.S_ISBLK(kind) and not stat.S_ISREG(kind):
            raise KatapodError(
                f"cannot use {info.device} of the direct volume {path}: it is neither a block device nor a file"
            )
        mark_volume(sandbox.store.layout, path, sandbox.sandbox_id)
        self._number += 1
        disk_id = f"direct-{self._number}"
        try:
            pci_path = await sandbox.add_disk(
                disk_id, Path(info.device), read_only=info.read_only, host_device=stat.S_ISBLK(kind)
            )
        except BaseException:
            unmark_volume(sandbox.store.layout, path, sandbox.sandbox_id)
            raise
        guest_path = f"{GUEST_SANDBOX_DIR}/storage/{volume_name(path)}"
        volume = self._volumes[path] = _Volume(info, disk_id, guest_path, pci_path)
        return volume

    async def resize(self, sandbox: TakesDisks, path: str, size: int) -> None:
        """Have the guest see that the device has grown, to `size` bytes at least. What is no direct volume is left
        alone. Raises KatapodError if it has not, VmmRefused."""
        async with self._lock:
            found = [each for name, each in self._volumes.items() if path in (name, each.info.device)]
            for volume in found:
                actual = await asyncio.to_thread(size_of_device, volume.info.device)
                if actual < size:
                    raise KatapodError(
                        f"cannot resize the direct volume {path} to {size} bytes: {volume.info.device} has {actual}",
                        hint="make the device larger first",
                    )
                await sandbox.resize_disk(volume.disk_id, actual)

    async def close(self, sandbox: TakesDisks, container_id: str) -> None:
        """The container has gone: take out the disks that nobody uses any more. Raises VmmRefused."""
        async with self._lock:
            for path, volume in list(self._volumes.items()):
                volume.users.discard(container_id)
                if not volume.users:
                    with contextlib.suppress(NotFound):  # taken out before, when what follows failed
                        await sandbox.remove_disk(volume.disk_id)
                    del self._volumes[path]
                    unmark_volume(sandbox.store.layout, path, sandbox.sandbox_id)


def _storage(volume: _Volume) -> agent_pb2.Storage:
    info = volume.info
    storage = agent_pb2.Storage(
        driver="blk",
        source=volume.pci_path,
        fstype=info.fstype,
        mount_point=volume.guest_path,
        options=info.options or (),
    )
    if info.fs_group is not None:
        storage.fs_group.group_id = info.fs_group
        storage.fs_group.group_change_policy = (
            types_pb2.OnRootMismatch if info.fs_group_only_if_root_differs else types_pb2.Always
        )
    return storage
