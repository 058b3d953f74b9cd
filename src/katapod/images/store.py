"""The image store: names, images, and the containers that use them.

Methods may be called by several processes at once; files.py explains why that is safe.
"""

import asyncio
import hashlib
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from katapod.images import busybox
from katapod.images.errors import AmbiguousName, ImageNotFound, RegistryDenied, RegistryUnreachable, WrongPlatform
from katapod.images.files import NameEntry, Staging, StoreFiles, is_full, remove_trees
from katapod.images.root_disk import make_root_disk
from katapod.images.source import (
    ARCHIVES,
    DEFAULT_ACCESS,
    Access,
    Survey,
    absolute,
    archive_tags,
    explain_archive_platform,
    read_stamp,
    survey,
    wrong_platform,
)
from katapod.images.transfer import Fetched, Progress, fetch, open_archive, scan_disk_bytes, sync_tree, unpack
from katapod.model.errors import UsageError
from katapod.model.ids import ContainerId
from katapod.model.image import (
    ImageRecord,
    Platform,
    SkopeoReference,
    StoredName,
    Transport,
    find_name,
    parse_image_name,
    parse_image_ref,
    parse_platform,
    remote_names,
    suggest_name,
)
from katapod.tasks import finish

__all__ = ["DEFAULT_ROOT", "ImageStore"]

log = logging.getLogger(__name__)

DEFAULT_ROOT = Path("/var/lib/katapod/images")
STALL_TIMEOUT_S = 120.0
BUSYBOX_PROGRAM = Path("/bin/busybox")
ACQUIRE_ATTEMPTS = 20  # each fails only if the image is removed right after it was found


class ImageStore:
    """Images below `root`. `stall_timeout_s` is how long a transfer may make no progress."""

    def __init__(
        self,
        root: Path = DEFAULT_ROOT,
        *,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        busybox_program: Path = BUSYBOX_PROGRAM,
    ) -> None:
        self.root = root
        self._files = StoreFiles(root)
        self._platform = parse_platform(os.uname().machine)
        self._stall_timeout_s = stall_timeout_s
        self._busybox_program = busybox_program

    # -- lookup

    @property
    def platform(self) -> Platform:
        """That of this machine, which all images have."""
        return self._platform

    def rootfs_path(self, digest: str) -> Path:
        """The unpacked files, for read-only use (lowerdir of an overlay); call hold() first."""
        return self._files.image_dir(digest) / "rootfs"

    async def list_images(self) -> tuple[ImageRecord, ...]:
        """All images by name; those that only a container keeps come last."""
        names = self._files.read_names()
        found = (self._files.read_record(digest, names) for digest in self._files.digests())
        return tuple(sorted(filter(None, found), key=lambda item: (not item.names, item.names, item.digest)))

    async def resolve(
        self,
        text: str,
        *,
        access: Access = DEFAULT_ACCESS,
        progress: Progress | None = None,
        holder: ContainerId | None = None,
    ) -> ImageRecord:
        """The image that a user means: a stored one, or a reference, which is imported if need be.

        An imported image is held for `holder` from the start; a stored one is not.

        A registry is asked only when nothing is stored under that name, and for a mere name only with
        `access.registries`; `oci:` and archives are
        imported again when they have changed. Raises ImageError or ImageParseError.
        """
        reference = parse_image_ref(text)
        if isinstance(reference, StoredName):
            return await self._resolve_name(reference, access, progress, holder)
        if reference.transport is Transport.DOCKER:
            stored = self._lookup(suggest_name(reference).text)
            return stored or await self.pull(text, access=access, progress=progress, holder=holder)
        source = absolute(reference, cwd=Path.cwd())
        entry = _known(self._files.read_names(), str(source), read_stamp(source))
        stored = self._files.read_record(entry.digest, self._files.read_names()) if entry else None
        return stored or await self._import(source, str(source), access, progress, holder)

    async def _resolve_name(
        self, wanted: StoredName, access: Access, progress: Progress | None, holder: ContainerId | None
    ) -> ImageRecord:
        names = self._files.read_names()
        if wanted.text == busybox.BUSYBOX_NAME:
            entry = names.get(busybox.BUSYBOX_NAME)
            if entry is None or entry.source == busybox.BUSYBOX_SOURCE:
                return await self.ensure_busybox(holder)
        name = _one_name(wanted, names)
        record = self._lookup(name) if name else None
        return record or await self._pull_by_name(wanted, None, access, progress, holder)

    async def _pull_by_name(
        self,
        wanted: StoredName,
        name: str | None,
        access: Access,
        progress: Progress | None,
        holder: ContainerId | None,
    ) -> ImageRecord:
        """From the first registry that has it. Raises ImageNotFound with what each has said."""
        causes = list[str]()
        for reference in () if access.registries is None else remote_names(wanted, access.registries):
            try:
                return await self._import(reference, name, access, progress, holder)
            except (ImageNotFound, RegistryDenied, RegistryUnreachable) as exc:
                causes.append(f"; {exc}")
        raise ImageNotFound(
            f"cannot find image {wanted.text}: it is not in the store{''.join(causes)}",
            hint=f"see kata-runtime image ls, or pull it: kata-runtime image pull docker://{wanted.text}",
        )

    def _lookup(self, name: str) -> ImageRecord | None:
        names = self._files.read_names()
        entry = names.get(name)
        return self._files.read_record(entry.digest, names) if entry else None

    # -- import

    async def import_image(
        self,
        source: str,
        name: str | None = None,
        *,
        access: Access = DEFAULT_ACCESS,
        progress: Progress | None = None,
        holder: ContainerId | None = None,
    ) -> ImageRecord:
        """Copy and unpack an image, and name it `name`, or by the reference.

        A second name for the same image costs nothing. Raises ImageError or ImageParseError.
        """
        reference = parse_image_ref(source)
        if isinstance(reference, StoredName):
            raise UsageError(
                f"cannot import {source}: it names no transport",
                hint=f"use for example oci-archive:FILE, docker-archive:FILE or docker://{reference.text}",
            )
        chosen = parse_image_name(name).text if name is not None else None
        return await self._import(absolute(reference, cwd=Path.cwd()), chosen, access, progress, holder)

    async def pull(
        self,
        source: str,
        name: str | None = None,
        *,
        access: Access = DEFAULT_ACCESS,
        progress: Progress | None = None,
        holder: ContainerId | None = None,
    ) -> ImageRecord:
        """import_image() for `docker://` references, and for mere names with `access.registries`."""
        reference = parse_image_ref(source)
        if isinstance(reference, StoredName) and access.registries is not None:
            chosen = parse_image_name(name).text if name is not None else None
            return await self._pull_by_name(reference, chosen, access, progress, holder)
        if isinstance(reference, StoredName) or reference.transport is not Transport.DOCKER:
            raise UsageError(f"cannot pull {source}: it names no registry", hint="use docker://HOST/NAME:TAG")
        return await self.import_image(source, name, access=access, progress=progress, holder=holder)

    async def _import(
        self,
        reference: SkopeoReference,
        name: str | None,
        access: Access,
        progress: Progress | None,
        holder: ContainerId | None,
    ) -> ImageRecord:
        source, stamp = str(reference), read_stamp(reference)
        known = _known(self._files.read_names(), source, stamp)
        if known is not None and name is not None:
            record = await self._commit(name, known, None, holder)
            if record is not None:
                return record
        async with self._files.staging() as staging:
            opened = await open_archive(reference, staging)
            name = name or await _default_name(reference, opened, staging)
            what = await survey(opened, access, self._platform, timeout_s=self._stall_timeout_s)
            known = _known_digest(self._files.read_names(), what)
            if known is not None:
                entry = NameEntry(known.digest, source, what.source_digest, stamp)
                record = await self._commit(name, entry, None, holder)
                if record is not None:
                    return record
            image = await self._fetch(opened, source, what, staging, access, progress)
            entry = NameEntry(image.digest, source, what.source_digest, stamp)
            return await self._keep(name, entry, image, staging, progress, holder)

    async def _fetch(
        self,
        reference: SkopeoReference,
        source: str,
        what: Survey,
        staging: Staging,
        access: Access,
        progress: Progress | None,
    ) -> Fetched:
        try:
            image = await fetch(what, staging, access, stall_timeout_s=self._stall_timeout_s, progress=progress)
        except WrongPlatform as exc:
            if reference.transport in ARCHIVES:
                raise await explain_archive_platform(
                    reference, source, self._platform, scratch=staging.scratch
                ) from exc
            raise
        if not self._platform.runs(image.config.platform):
            raise wrong_platform(source, [image.config.platform], self._platform)
        return image

    async def _keep(
        self,
        name: str,
        entry: NameEntry,
        image: Fetched,
        staging: Staging,
        progress: Progress | None,
        holder: ContainerId | None,
    ) -> ImageRecord:
        """Unpack, unless that has been done, and set the name."""
        while True:
            if not self._files.image_dir(image.digest).exists():
                await unpack(image, staging, what=entry.source, progress=progress)
                await self._seal(staging, image.config_bytes, entry.source)
                await sync_tree(staging.image)
            record = await self._commit(name, entry, staging, holder)
            if record is not None:
                return record
            # It was removed between the lookup and the lock: unpack it ourselves.

    async def _seal(self, staging: Staging, config: bytes, source: str) -> None:
        size_bytes = await finish(asyncio.to_thread(scan_disk_bytes, staging.rootfs))
        staging.describe_image(config, size_bytes=size_bytes, created=datetime.now(UTC), source=source)

    async def _commit(
        self, name: str, entry: NameEntry, staging: Staging | None, holder: ContainerId | None
    ) -> ImageRecord | None:
        """Move the image of `staging`, if any, to its place, name it, and hold it for `holder`, atomically. None if it
        does not exist."""
        async with self._files.locked():
            if staging is not None:
                self._files.adopt(entry.digest, staging)
            if not self._files.image_dir(entry.digest).exists():
                return None
            names = self._files.read_names() | {name: entry}
            self._files.write_names(names)
            if holder is not None:
                self._files.add_user(entry.digest, holder)
            trash = self._files.collect(names)
            record = self._files.read_record(entry.digest, names)
        await finish(remove_trees(trash))
        return record

    async def ensure_busybox(self, holder: ContainerId | None = None) -> ImageRecord:
        """The image around the host's busybox; made if it is missing or the program has changed.

        Quick otherwise: one stat and three small files. Raises ImageError without a static busybox.
        """
        program, name = self._busybox_program, busybox.BUSYBOX_NAME
        stored = self._files.read_names().get(name)
        record = self._lookup(name)
        if stored is not None and record is not None and not program.exists():
            log.warning("%s is missing; the existing image is used", program)
            return record
        stamp = busybox.busybox_stamp(program)
        if stored is not None and record is not None and stored.stamp == stamp:
            return record
        data = await asyncio.to_thread(program.read_bytes)
        busybox.check_static(data, program)
        config = busybox.busybox_config(data, architecture=self._platform.architecture)
        digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
        entry = NameEntry(digest, busybox.BUSYBOX_SOURCE, stamp=stamp)
        applets = await busybox.list_applets(program)
        async with self._files.staging() as staging:
            await finish(asyncio.to_thread(busybox.make_rootfs, staging.rootfs, data, applets))
            await self._seal(staging, config, busybox.BUSYBOX_SOURCE)
            made = await self._commit(name, entry, staging, holder)
        assert made is not None
        return made

    # -- use and removal

    async def by_digest(self, digest: str) -> ImageRecord:
        """One that is held, whatever its names are by now. Raises ImageNotFound, StoreDamaged."""
        record = self._files.read_record(digest, self._files.read_names())
        if record is None:
            raise ImageNotFound(f"cannot use image {digest}: it was removed")
        return record

    async def hold(self, digest: str, container_id: ContainerId) -> None:
        """Record that a container uses the image, so that it is kept until release().

        This is on disk and outlives the process. Idempotent. Raises ImageNotFound if the image is gone.
        """
        async with self._files.locked():
            self._files.add_user(digest, container_id)

    async def root_disk(self, record: ImageRecord) -> Path:
        """The image's files as a disk (plan/root_disk.py), for read-only use; call hold() first.

        Made at the first call; removed with the image. Raises MissingProgram, ProcessFailed, ImageError.
        """
        place = self._files.disk_path(record.digest)
        if place.exists():
            return place
        async with self._files.making_disk(record.digest):
            if place.exists():
                return place
            async with self._files.staging() as staging:
                made = staging.path / place.name
                await make_root_disk(
                    self.rootfs_path(record.digest), made, content_bytes=record.size_bytes, scratch=staging.scratch
                )
                async with self._files.locked():
                    self._files.adopt_disk(record.digest, made)
        return place

    async def release(self, container_id: ContainerId) -> None:
        """Forget a container; an image without a name or another container is removed. Idempotent."""
        if not self.root.exists():
            return
        async with self._files.locked():
            freed = self._files.drop_user(container_id)
            trash = self._files.collect(self._files.read_names()) if freed else []
        await finish(remove_trees(trash))

    async def acquire(
        self,
        text: str,
        container_id: ContainerId,
        *,
        access: Access = DEFAULT_ACCESS,
        progress: Progress | None = None,
    ) -> ImageRecord:
        """resolve() and hold(), repeated if a stored image is removed in between."""
        for _ in range(ACQUIRE_ATTEMPTS - 1):
            record = await self.resolve(text, access=access, progress=progress, holder=container_id)
            try:
                await self.hold(record.digest, container_id)
            except ImageNotFound:
                log.debug("image %s was removed before we held it", record.digest)
            else:
                return record
        record = await self.resolve(text, access=access, progress=progress, holder=container_id)
        await self.hold(record.digest, container_id)
        return record

    async def tag(self, text: str, name: str) -> str:
        """Give a stored image one more name, which another image may have had; returns the full name.

        Raises ImageNotFound, AmbiguousName, ImageParseError.
        """
        wanted, chosen = parse_image_name(text), parse_image_name(name).text
        if wanted.text == busybox.BUSYBOX_NAME:
            await self.ensure_busybox()
        entry = self._files.read_names().get(_one_name(wanted, self._files.read_names()) or "")
        made = await self._commit(chosen, entry, None, None) if entry is not None else None
        if made is None:
            raise ImageNotFound(f"cannot tag image {text}: it is not in the store", hint="see kata-runtime image ls")
        return chosen

    def users(self, digest: str) -> list[str]:
        """The containers that have it, by their ids."""
        return self._files.users(digest)

    def config_bytes(self, digest: str) -> bytes:
        """Its OCI config, as it came. Raises OSError."""
        return (self._files.image_dir(digest) / "config.json").read_bytes()

    async def remove(self, text: str) -> str:
        """Remove a name, and with its last name the image, once no container uses it. Returns the full name.

        Works on a full disk. Raises ImageNotFound or AmbiguousName.
        """
        reference = parse_image_ref(text)
        async with self._files.locked():
            names = self._files.read_names()
            if isinstance(reference, StoredName):
                name = _one_name(reference, names)
            elif reference.transport is Transport.DOCKER:
                name = suggest_name(reference).text
            else:
                name = str(
                    SkopeoReference(
                        reference.transport,
                        os.path.normpath(Path.cwd() / reference.location),
                        reference.selector,
                    )
                )
            if name is None or name not in names:
                raise ImageNotFound(
                    f"cannot remove image {text}: it is not in the store", hint="see kata-runtime image ls"
                )
            left = {key: entry for key, entry in names.items() if key != name}
            try:
                self._files.write_names(left)
                trash = self._files.collect(left)
            except OSError as exc:
                if not is_full(exc):
                    raise
                # No space for the new file of names: free some. A name without an image counts as absent.
                await finish(remove_trees(self._files.collect(left)))
                self._files.write_names(left)
                trash = []
        await finish(remove_trees(trash))
        return name


async def _default_name(reference: SkopeoReference, opened: SkopeoReference, staging: Staging) -> str:
    """The name in a docker-archive, or one made from the reference."""
    if reference.transport is Transport.DOCKER_ARCHIVE and not reference.selector:
        tags = await archive_tags(opened, scratch=staging.scratch)
        if tags:
            return parse_image_name(tags[0]).text
    return suggest_name(reference).text


def _one_name(wanted: StoredName, names: Mapping[str, NameEntry]) -> str | None:
    found = find_name(wanted, names)
    if len({names[name].digest for name in found}) > 1:
        raise AmbiguousName(
            f"cannot tell which image {wanted.text} is: it may be {', '.join(found)}",
            hint="use the full name",
        )
    return found[0] if found else None


def _known(names: Mapping[str, NameEntry], source: str, stamp: str) -> NameEntry | None:
    """An earlier import of the same unchanged local source."""
    if not stamp:
        return None
    return next((item for item in names.values() if (item.source, item.stamp) == (source, stamp)), None)


def _known_digest(names: Mapping[str, NameEntry], what: Survey) -> NameEntry | None:
    """An earlier import of the same manifest."""
    if not what.source_digest:
        return None
    return next((item for item in names.values() if item.source_digest == what.source_digest), None)
