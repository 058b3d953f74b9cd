"""images: the store of container images, unpacked and shared by all containers that use them.

It imports images (skopeo, umoci, the host's busybox), names them, and keeps each for as long as a name or a container
refers to it. It mounts nothing and knows nothing about sandboxes: these use `root_disk()`, or `rootfs_path()` as the
lower layer of an overlay, between `hold()` and `release()`.
"""

from katapod.images.errors import (
    AmbiguousName,
    BrokenImage,
    ImageError,
    ImageNotFound,
    RegistryDenied,
    RegistryUnreachable,
    StoreDamaged,
    StoreFull,
    WrongPlatform,
)
from katapod.images.source import Access
from katapod.images.store import DEFAULT_ROOT, ImageStore
from katapod.images.transfer import Progress

__all__ = [
    "DEFAULT_ROOT",
    "Access",
    "AmbiguousName",
    "BrokenImage",
    "ImageError",
    "ImageNotFound",
    "ImageStore",
    "Progress",
    "RegistryDenied",
    "RegistryUnreachable",
    "StoreDamaged",
    "StoreFull",
    "WrongPlatform",
]
