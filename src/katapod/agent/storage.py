"""Storages of the agent protocol: file systems mounted for a container or for the whole sandbox.

Each mount point has a user count and is unmounted when that drops to 0. Source: Kata Containers,
docs/design/architecture/storage.md and the comments of agent.proto.
"""

from __future__ import annotations

import errno
import os
import stat

from katapod.agent import devices, log, trace
from katapod.agent.loop import Lock, Loop
from katapod.agent.paths import bundle_of
from katapod.agent.uml_disks import bind_place, is_uml_place
from katapod.kernel.mount import (
    MNT_DETACH,
    MS_BIND,
    MS_PRIVATE,
    MS_REC,
    MS_REMOUNT,
    MS_SHARED,
    MS_SLAVE,
    mount,
    parse_options,
    umount,
)
from katapod.kernel.trees import walk_tree
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from katapod.rpc.pb import agent_pb2

__all__ = ["DRIVERS", "Storages", "bind"]

DRIVERS = ("virtio-fs", "ephemeral", "local", "bind", "overlayfs", "blk")
OVERLAY_RW = "io.katacontainers.fs-opt.overlay-rw"
OVERLAY_CREATE = "io.katacontainers.volume.overlayfs.create_directory"
SHARE_PLACE = "katapod.place"  # an option: where a shared directory is that came after the boot
RETRY_S = 0.02
_PROPAGATION = MS_PRIVATE | MS_SLAVE | MS_SHARED


def bind(source: str, target: str, flags: int = 0) -> None:
    """Bind-mount recursively; flags such as read-only need a second step. Raises OSError."""
    mount(source, target, None, MS_BIND | MS_REC)
    extra = flags & ~(MS_BIND | MS_REC | _PROPAGATION)
    try:
        if extra:
            mount("none", target, None, MS_BIND | MS_REMOUNT | extra)
        if flags & _PROPAGATION:
            mount("none", target, None, flags & (_PROPAGATION | MS_REC))
    except OSError:
        umount(target, MNT_DETACH)
        raise


def _invalid(text: str) -> RpcError:
    return RpcError(StatusCode.INVALID_ARGUMENT, text)


def _check_mount_point(path: str) -> str:
    if not path.startswith("/") or ".." in path.split("/"):
        raise _invalid(f"cannot mount at {path[:200]!r}: the mount point must be an absolute path without '..'")
    return os.path.normpath(path)


def _value(options: Iterable[str], key: str) -> str:
    return next((o.partition("=")[2] for o in options if o.startswith(f"{key}=")), "")


class Storages:
    """Mount points with their user counts."""

    def __init__(self, loop: Loop, hotplug_timeout_s: float) -> None:
        self._loop = loop
        self._timeout_s = hotplug_timeout_s
        self._lock = Lock()
        self._users: dict[str, int] = {}
        self._mounted: set[str] = set()  # those that must be unmounted

    async def add(self, storages: Iterable[agent_pb2.Storage], container_id: str) -> list[str]:
        """Mount in order; returns the mount points that the caller now holds and must release.

        Storages of the sandbox (shared, or no container id) are held by the sandbox itself. Raises
        RpcError, OSError; then nothing of this call is held.
        """
        held: list[str] = []
        try:
            for storage in storages:
                point = _check_mount_point(storage.mount_point)
                async with self._lock:
                    if point not in self._users:
                        with trace.Span(f"mount {storage.driver}"):
                            mounted = await self._mount(storage, point, container_id)
                        if mounted:
                            self._mounted.add(point)
                        self._users[point] = 1 if storage.shared else 0  # 1: the sandbox's own hold
                    self._users[point] += 1
                    held.append(point)
        except BaseException:
            self.release(held)
            raise
        return held

    def release(self, points: list[str]) -> None:
        """Release in reverse order; the last user unmounts."""
        for point in reversed(points):
            left = self._users.get(point, 0) - 1
            if left > 0:
                self._users[point] = left
                continue
            self._users.pop(point, None)
            if point in self._mounted:
                self._mounted.discard(point)
                try:
                    umount(point, MNT_DETACH)
                except OSError as exc:
                    log.warning(f"cannot unmount {point}: {exc.strerror}")

    def release_all(self) -> None:
        for point in reversed(list(self._users)):
            self._users[point] = 1
            self.release([point])

    async def _mount(self, storage: agent_pb2.Storage, point: str, container_id: str) -> bool:
        """True if there is something to unmount later."""
        driver = storage.driver
        if driver not in DRIVERS:
            known = ", ".join(DRIVERS)
            raise _invalid(f"cannot mount {point}: storage driver {driver[:64]!r} is not supported ({known})")
        options = list(storage.options)
        try:
            if driver == "local":
                _make_local(point, options)
                mounted = False
            elif driver == "ephemeral":
                _mount_ephemeral(storage.source, storage.fstype, point, options)
                mounted = True
            elif driver == "overlayfs":
                _mount_overlay(storage, point, options, container_id)
                mounted = True
            else:
                source = storage.source
                if driver == "blk":
                    source = await devices.block_device(self._loop, source, self._timeout_s)
                elif is_uml_place(place := _value(storage.driver_options, SHARE_PLACE)) and not bind_place(place):
                    raise OSError(errno.ENODEV, "nobody serves the shared directory", place)
                await self._mount_source(driver, source, storage.fstype, point, options)
                mounted = True
            if storage.HasField("fs_group"):
                _set_group(
                    point, storage.fs_group.group_id, only_if_root_differs=storage.fs_group.group_change_policy == 1
                )
        except OSError as exc:
            where = f" ({exc.filename})" if exc.filename and exc.filename != point else ""
            raise RpcError(
                StatusCode.INTERNAL, f"cannot mount {driver} {storage.source} at {point}: {exc.strerror}{where}"
            ) from exc
        return mounted

    async def _mount_source(self, driver: str, source: str, fstype: str, point: str, options: list[str]) -> None:
        flags, data = parse_options(options)
        if flags & MS_BIND or fstype == "bind" or driver == "bind":
            _make_target_like(source, point)
            bind(source, point, flags)
            return
        os.makedirs(point, exist_ok=True)
        for attempt in range(max(1, int(self._timeout_s / RETRY_S))):
            if attempt:
                await self._loop.sleep(RETRY_S)
            try:
                mount(source, point, fstype, flags, data)
                return
            except OSError as exc:
                # It may have just been plugged in. EINVAL: no device has this virtio-fs tag yet. ENXIO: the disk's
                # node exists, but the kernel has not attached the disk to it yet.
                if (driver, exc.errno) not in (("virtio-fs", errno.EINVAL), ("blk", errno.ENXIO)):
                    raise
        what = "the disk does not appear" if driver == "blk" else f"no virtio-fs device has the tag {source!r}"
        raise OSError(errno.ENODEV, what, point)


def _make_target_like(source: str, point: str) -> None:
    if os.path.isdir(source):
        os.makedirs(point, exist_ok=True)
        return
    os.makedirs(os.path.dirname(point), exist_ok=True)
    os.close(os.open(point, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644))


def _group_of(options: list[str]) -> int:
    text = _value(options, "fsgid")
    if text and not text.isdigit():
        raise _invalid(f"cannot read the storage option fsgid={text[:32]}: it is not a number")
    return int(text) if text else -1


def _give_to_group(point: str, gid: int) -> None:
    os.chown(point, -1, gid)
    os.chmod(point, stat.S_IMODE(os.stat(point).st_mode) | stat.S_ISGID)


def _make_local(point: str, options: list[str]) -> None:
    mode = _value(options, "mode")
    os.makedirs(point, exist_ok=True)
    if mode:
        os.chmod(point, int(mode, 8))
    gid = _group_of(options)
    if gid >= 0:
        _give_to_group(point, gid)


def _mount_ephemeral(source: str, fstype: str, point: str, options: list[str]) -> None:
    gid = _group_of(options)
    flags, data = parse_options(o for o in options if not o.startswith("fsgid="))
    os.makedirs(point, exist_ok=True)
    if fstype == "hugetlbfs":
        _reserve_huge_pages(_value(options, "pagesize"), _value(options, "size"))
        mount("nodev", point, "hugetlbfs", flags, data)
    else:
        mount(source or "tmpfs", point, "tmpfs", flags, data)
    if gid >= 0:
        _give_to_group(point, gid)


def _bytes(text: str) -> int:
    units = {"k": 10, "m": 20, "g": 30}
    digits = text.rstrip("BbiI")
    shift = units.get(digits[-1:].lower(), 0)
    number = digits[:-1] if shift else digits
    if not number.isdigit():
        raise _invalid(f"cannot read {text[:32]!r} as a size")
    return int(number) << shift


def _reserve_huge_pages(pagesize: str, size: str) -> None:
    page, total = _bytes(pagesize), _bytes(size)
    path = f"/sys/kernel/mm/hugepages/hugepages-{page >> 10}kB/nr_hugepages"
    with open(path) as handle:
        have = int(handle.read())
    wanted = have + total // page
    with open(path, "w") as handle:
        handle.write(str(wanted))
    with open(path) as handle:
        if int(handle.read()) < wanted:
            raise OSError(errno.ENOMEM, "the guest does not have enough memory for huge pages", path)


def _mount_overlay(storage: agent_pb2.Storage, point: str, options: list[str], container_id: str) -> None:
    for option in storage.driver_options:
        key, _, value = option.partition("=")
        if key == OVERLAY_CREATE:
            os.makedirs(_check_mount_point(value), exist_ok=True)
    if OVERLAY_RW in options:
        options = [o for o in options if o != OVERLAY_RW]
        for kind in ("upper", "work"):  # /run is a tmpfs
            directory = f"{bundle_of(container_id)}/{kind}"
            os.makedirs(directory, exist_ok=True)
            options.append(f"{kind}dir={directory}")
    flags, data = parse_options(options)
    os.makedirs(point, exist_ok=True)
    mount(storage.source or "overlay", point, "overlay", flags, data)


def _set_group(root: str, gid: int, only_if_root_differs: bool) -> None:
    top = os.lstat(root)
    if only_if_root_differs and top.st_gid == gid and top.st_mode & stat.S_ISGID:
        return
    for directory, name in walk_tree(root):
        _give_entry_to_group(name, directory, gid)
    _give_entry_to_group(root, None, gid)  # last: it marks the rest as done


def _give_entry_to_group(name: str, directory: int | None, gid: int) -> None:
    mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    os.chown(name, -1, gid, dir_fd=directory, follow_symlinks=False)
    if stat.S_ISDIR(mode):
        os.chmod(name, stat.S_IMODE(mode) | stat.S_ISGID | stat.S_IRWXG, dir_fd=directory)  # noqa: S103
    elif stat.S_ISREG(mode):
        os.chmod(name, stat.S_IMODE(mode) | stat.S_IRGRP | stat.S_IWGRP, dir_fd=directory)
