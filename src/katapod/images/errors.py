"""Errors about images, by what a caller can do about them:

    ImageError
    |-- ImageNotFound         no such name, file, tag or repository        (also model.errors.NotFound)
    |-- AmbiguousName         a short name fits several images
    |-- BrokenImage           the archive, a layer or the config is damaged, or not a container image
    |-- WrongPlatform         built for another machine
    |-- RegistryUnreachable   no connection, or not by TLS
    |-- RegistryDenied        credentials are missing or wrong
    |-- StoreFull             no space left                                (also model.errors.NoSpace)
    `-- StoreDamaged          a file of the store itself cannot be read

References that cannot be parsed raise model.image.ImageParseError; a missing skopeo or umoci raises
model.errors.MissingProgram.
"""

from katapod.model.errors import KatapodError, NoSpace, NotFound

__all__ = [
    "AmbiguousName",
    "BrokenImage",
    "ImageError",
    "ImageNotFound",
    "RegistryDenied",
    "RegistryUnreachable",
    "StoreDamaged",
    "StoreFull",
    "WrongPlatform",
]


class ImageError(KatapodError):
    """Base of this room's errors."""


class ImageNotFound(ImageError, NotFound):
    """There is no such image, here or at its source."""


class AmbiguousName(ImageError):
    """A short name stands for more than one image."""


class BrokenImage(ImageError):
    """The image is damaged, or not a container image."""


class WrongPlatform(ImageError):
    """The image is built for another architecture or operating system."""


class RegistryUnreachable(ImageError):
    """No connection to the registry, or none that can be trusted."""


class RegistryDenied(ImageError):
    """The registry requires (other) credentials."""


class StoreFull(ImageError, NoSpace):
    """The file system of the store has no room for the image."""


class StoreDamaged(ImageError):
    """A file of the store is not as it was written."""
