"""Container images of this host's store."""

from collections.abc import Callable
from datetime import datetime

from msgspec import Struct

from katapod.api.context import image_store
from katapod.model.image import ImageRecord

__all__ = ["Image"]

Progress = Callable[[str, int, int | None], None]


class Image(Struct, frozen=True):
    """One image, as it was when it was looked up. `digest`: sha256 of its OCI config, by which the same image is known
    wherever it came from. `size_bytes`: disk space of its unpacked files. `source`: the reference it came from.
    """

    digest: str
    names: tuple[str, ...]
    size_bytes: int
    created: datetime
    source: str
    command: tuple[str, ...]
    env: tuple[str, ...]
    labels: dict[str, str]

    @classmethod
    async def pull(cls, reference: str, name: str | None = None, *, progress: Progress | None = None) -> "Image":
        """Bring an image in: docker://HOST/NAME:TAG, oci:PATH, oci-archive:FILE, docker-archive:FILE or dir:PATH; named
        `name`, or by the reference. `progress` is called with phase, bytes done, and bytes in all if that is known.

        Raises UsageError, ImageError.
        """
        return _image_of(await image_store().import_image(reference, name, progress=progress))

    @classmethod
    async def find(cls, name: str) -> "Image":
        """An image of the store, by its name or the end of it: `debian:12` finds docker.io/library/debian:12. By a
        reference it is brought in if it is not there, as where a container is created.

        Raises UsageError, ImageError.
        """
        return _image_of(await image_store().resolve(name))

    @classmethod
    async def list(cls) -> "tuple[Image, ...]":
        """All images by name; `busybox` is made when it is first used."""
        return tuple(_image_of(record) for record in await image_store().list_images())

    @classmethod
    async def remove(cls, name: str) -> str:
        """Remove a name, and with its last name the image, once no container uses it. Returns the full name. Raises
        UsageError, ImageError."""
        return await image_store().remove(name)


def _image_of(record: ImageRecord) -> Image:
    config = record.config
    return Image(
        digest=record.digest,
        names=record.names,
        size_bytes=record.size_bytes,
        created=record.created,
        source=record.source,
        command=(*config.entrypoint, *config.cmd),
        env=config.env,
        labels=config.labels,
    )
