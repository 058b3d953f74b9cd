"""The store on disk: layout, writer lock, staging, and removal of what is no longer needed.

    ROOT/lock                        flock(2), held by a writer for a moment only
    ROOT/names.json                  name -> digest and source; replaced by rename
    ROOT/images/HEX/                 image.json, config.json (verbatim), rootfs/; moved here whole by rename.
                                     A flock(2) on the directory is held while the next one is made
    ROOT/images/HEX/root-N.ext4      the files as a disk, once a container has needed it; N: its format
    ROOT/refs/HEX/CONTAINER-ID       empty file: this container uses the image
    ROOT/tmp/RANDOM/                 staging of one writer, with a flock(2) of its own; or trash, without

A process may die between any two steps. An image then exists completely or not at all, the kernel has released the
locks, and the next writer removes unlocked staging directories. HEX instead of `sha256:HEX`, since a colon separates
the layers in overlayfs's lowerdir option.
"""

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from katapod.host.hints import hint_for
from katapod.host.process import run
from katapod.images.errors import ImageError, ImageNotFound, StoreDamaged, StoreFull
from katapod.model.image import ImageParseError, ImageRecord, parse_digest, parse_image_config
from katapod.model.plain import plain
from katapod.model.tokens import random_hex
from katapod.plan.root_disk import ROOT_DISK_FORMAT
from katapod.tasks import finish

__all__ = ["NameEntry", "Staging", "StoreFiles", "is_full", "remove_trees"]

log = logging.getLogger(__name__)

LOCK_POLL_S = 0.01
LOCK_TIMEOUT_S = 60.0


class NameEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a name refers to."""

    digest: str
    source: str
    """The reference that it was imported from, with absolute paths."""
    source_digest: str = ""
    """Digest of the manifest (or index) at the source, where the source has one."""
    stamp: str = ""
    """Identity of a local source when it was read; if it differs, the source may have changed."""


class _NamesFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    names: dict[str, NameEntry]
    version: int = 1


class _ImageFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """image.json: what is not in the OCI config."""

    size_bytes: int
    created: datetime
    source: str


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class Staging(Struct, frozen=True):
    """The directory of one writer. What is left in it at the end is removed."""

    path: Path

    @property
    def layout(self) -> Path:
        return self.path / "layout"

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"

    @property
    def image(self) -> Path:
        return self.path / "image"

    @property
    def rootfs(self) -> Path:
        return self.image / "rootfs"

    def describe_image(self, config: bytes, *, size_bytes: int, created: datetime, source: str) -> None:
        """Complete `image`, beside its unpacked rootfs."""
        info = _ImageFile(size_bytes=size_bytes, created=created, source=source)
        _write_durably(self.image / "config.json", config)
        _write_durably(self.image / "image.json", msgspec.json.encode(info))


class StoreFiles:
    """Methods that say so must be called with `locked()` held."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names = root / "names.json"
        self._images = root / "images"
        self._refs = root / "refs"
        self._tmp = root / "tmp"

    # -- reading: needs no lock, because files appear complete

    def image_dir(self, digest: str) -> Path:
        return self._images / parse_digest(digest)

    def disk_path(self, digest: str) -> Path:
        return self.image_dir(digest) / f"root-{ROOT_DISK_FORMAT}.ext4"

    def read_names(self) -> dict[str, NameEntry]:
        try:
            return msgspec.json.decode(self._names.read_bytes(), type=_NamesFile).names
        except FileNotFoundError:
            return {}
        except OSError as exc:
            raise ImageError(f"cannot read {self._names}: {exc.strerror}", hint=hint_for(exc)) from exc
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise StoreDamaged(
                f"cannot read {self._names}: {exc}",
                hint=f"start a new one, and import the images again: mv {self._names} {self._names}.damaged",
            ) from exc

    def digests(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(f"sha256:{entry}" for entry in os.listdir(self._images))
        return []

    def read_record(self, digest: str, names: Mapping[str, NameEntry]) -> ImageRecord | None:
        """The image of that digest; None if it does not exist (any more)."""
        place = self.image_dir(digest)
        try:
            info = msgspec.json.decode((place / "image.json").read_bytes(), type=_ImageFile)
            config = parse_image_config((place / "config.json").read_bytes())
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise ImageError(f"cannot read the image in {place}: {exc.strerror}", hint=hint_for(exc)) from exc
        except (msgspec.DecodeError, ImageParseError) as exc:
            called = " ".join(sorted(name for name, entry in names.items() if entry.digest == digest))
            hint = f"remove it, and import it again: kata-runtime image rm {called}" if called else ""
            raise StoreDamaged(f"cannot read the image in {place}: {exc}", hint=hint) from exc
        return ImageRecord(
            digest=digest,
            names=tuple(sorted(name for name, entry in names.items() if entry.digest == digest)),
            config=config,
            size_bytes=info.size_bytes,
            created=info.created,
            source=info.source,
        )

    # -- writing

    @contextlib.asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Be the only writer. Polls, since a thread that blocks in flock(2) cannot be cancelled.

        Errors of the file system within the block become ImageError, a full disk StoreFull.
        """
        try:
            async with self._locked():
                yield
        except OSError as exc:
            raise _store_error(self.root, exc) from exc

    @contextlib.asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        self._make_root()
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                async with asyncio.timeout(LOCK_TIMEOUT_S):
                    while not _try_lock(fd):  # noqa: ASYNC110 - the holder is another process
                        await asyncio.sleep(LOCK_POLL_S)
            except TimeoutError as exc:
                raise ImageError(
                    f"cannot lock the image store {self.root}: another process has held it for {LOCK_TIMEOUT_S:g} s"
                ) from exc
            yield
        finally:
            os.close(fd)

    def _make_root(self) -> None:
        if ":" in str(self.root):
            raise ImageError(f"cannot use the image store {self.root}: a colon in its path separates overlay layers")
        try:
            # Only root may reach the set-user-ID programs in the images.
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for directory in (self._images, self._refs, self._tmp):
                directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as exc:
            if is_full(exc):
                raise
            raise ImageError(f"cannot use the image store {self.root}: {exc.strerror}", hint=hint_for(exc)) from exc

    @contextlib.asynccontextmanager
    async def making_disk(self, digest: str) -> AsyncIterator[None]:
        """Be the only one to make the disk of an image that is held. Waits while another process is making it. Raises
        ImageNotFound."""
        try:
            fd = os.open(self.image_dir(digest), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as exc:
            raise ImageNotFound(f"cannot use image {digest}: it was removed") from exc
        try:
            while not _try_lock(fd):  # noqa: ASYNC110 - the holder is another process
                await asyncio.sleep(LOCK_POLL_S)
            yield
        finally:
            os.close(fd)

    @contextlib.asynccontextmanager
    async def staging(self) -> AsyncIterator[Staging]:
        """Open a staging directory; removes those of dead writers first.

        A full disk, at any step within the block, becomes StoreFull.
        """
        try:
            async with self.locked():
                dead = self._claim_dead()
                place = self._tmp / random_hex(8)
                place.mkdir(mode=0o700)
                fd = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                assert _try_lock(fd)
            try:
                await finish(remove_trees([path for path, _ in dead]))
                staging = Staging(place)
                for directory in (staging.scratch, staging.image):
                    directory.mkdir(mode=0o700)
                yield staging
            finally:
                for _, claim in dead:
                    os.close(claim)
                try:
                    await finish(remove_trees([place]))
                finally:
                    os.close(fd)
        except OSError as exc:
            raise _store_error(self.root, exc) from exc

    def _claim_dead(self) -> list[tuple[Path, int]]:
        """Lock the staging directories of dead writers, so that no other writer removes them too.

        Needs the lock. What has no lock file is trash, or a file that was not renamed in time: it can be removed.
        """
        dead = []
        for place in self._tmp.iterdir():
            try:
                fd = os.open(place / "lock", os.O_RDWR | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
                dead.append((place, fd))
                continue
            if _try_lock(fd):
                dead.append((place, fd))
            else:
                os.close(fd)
        return dead

    def write_names(self, names: Mapping[str, NameEntry]) -> None:
        """Needs the lock. Readers see either the old names or the new ones, also after a crash."""
        temporary = self._tmp / f"names.{random_hex(8)}"
        try:
            data = msgspec.json.encode(_NamesFile(names=dict(sorted(names.items()))))
            _write_durably(temporary, msgspec.json.format(data))
            os.replace(temporary, self._names)
        finally:
            temporary.unlink(missing_ok=True)

    def adopt(self, digest: str, staging: Staging) -> None:
        """Needs the lock. Move the finished image in `staging` to its place, unless another writer was faster."""
        place = self.image_dir(digest)
        if (staging.image / "image.json").exists() and not place.exists():
            os.rename(staging.image, place)

    def adopt_disk(self, digest: str, made: Path) -> None:
        """Needs the lock. Move a finished disk to its image. Raises ImageNotFound if that is gone."""
        if not self.image_dir(digest).exists():
            raise ImageNotFound(f"cannot use image {digest}: it was removed")
        os.rename(made, self.disk_path(digest))

    def collect(self, names: Mapping[str, NameEntry]) -> list[Path]:
        """Needs the lock. Set aside images without a name or a container, for remove_trees() after the lock is
        released.

        This is a rename, which works on a full disk too.
        """
        wanted = {entry.digest for entry in names.values()}
        trash = []
        for digest in self.digests():
            if digest not in wanted and not self.users(digest):
                place = self._tmp / f"trash.{random_hex(8)}"
                os.rename(self.image_dir(digest), place)
                trash.append(place)
        return trash

    def users(self, digest: str) -> list[str]:
        """The containers that hold the image."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(os.listdir(self._refs / parse_digest(digest)))
        return []

    def add_user(self, digest: str, container_id: str) -> None:
        """Needs the lock. Raises ImageNotFound if the image is gone."""
        if not self.image_dir(digest).exists():
            raise ImageNotFound(f"cannot use image {digest} for container {container_id}: it was removed")
        refs = self._refs / parse_digest(digest)
        refs.mkdir(mode=0o700, exist_ok=True)
        (refs / container_id).touch(mode=0o600)

    def drop_user(self, container_id: str) -> bool:
        """Needs the lock. Forget a container; returns whether that leaves an image unused."""
        freed = False
        for refs in self._refs.iterdir():
            with contextlib.suppress(FileNotFoundError):
                (refs / container_id).unlink()
            with contextlib.suppress(OSError):  # not empty: other containers use it
                refs.rmdir()
                freed = True
        return freed


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def remove_trees(paths: Sequence[Path]) -> None:
    """Remove trees that may be hostile: rm(1) handles any depth and follows no symbolic link.

    Two processes may remove the same one; the next writer removes what is left then.
    """
    if not paths:
        return
    argv = ["rm", "-rf", "--one-file-system", "--", *map(str, paths)]
    done = await run(argv, timeout_s=None, check=False)
    if done.returncode != 0:
        log.warning("cannot remove %s completely yet: %s", ", ".join(map(str, paths)), done.stderr.strip())


def is_full(exc: OSError) -> bool:
    return exc.errno in (errno.ENOSPC, errno.EDQUOT)


def _store_error(root: Path, exc: OSError) -> ImageError:
    if is_full(exc):
        return StoreFull(
            f"cannot write to the image store {root}: {exc.strerror}",
            hint=f"{hint_for(exc)}, or remove images that are not needed: kata-runtime image rm NAME",
        )
    place = f": {plain(os.fsdecode(exc.filename))}" if exc.filename else ""
    return ImageError(f"cannot work in the image store {root}{place}: {exc.strerror or exc}", hint=hint_for(exc))
