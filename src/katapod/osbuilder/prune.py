"""Remove guest images that are no longer needed."""

import contextlib
import logging
import os
from pathlib import Path

from katapod.osbuilder.cache import IMAGES, BuiltImage, current_images, list_images, locked_cache, remove_image
from katapod.osbuilder.kernel import MODULE_ROOTS

__all__ = ["prune_images"]

log = logging.getLogger(__name__)


async def prune_images(
    cache_dir: Path, *, also_installed: bool = False, system_root: Path = Path("/")
) -> list[BuiltImage]:
    """Remove the images of kernels that are no longer installed, or all that are not in use; return them.

    In use are the images that links point to, and those that a running program was started with. Raises OsbuilderError.
    """
    removed = []
    async with locked_cache(cache_dir):
        current = {image.initrd for image in current_images(cache_dir)}
        candidates = [
            image
            for image in list_images(cache_dir)
            if image.initrd not in current
            and (also_installed or not (system_root / MODULE_ROOTS[image.vmm] / image.kernel_version).is_dir())
        ]
        running = _what_programs_use() if candidates else (set(), set())
        for image in candidates:
            if _is_used(image, *running):
                log.info("the image in %s is kept: a VM runs from it", image.kernel.parent)
                continue
            remove_image(cache_dir, image)
            removed.append(image)
    return removed


def _is_used(image: BuiltImage, commands: set[bytes], mounted: set[tuple[int, int]]) -> bool:
    directory = f"/{IMAGES}/{image.kernel.parent.name}/".encode()
    files = {(file.st_dev, file.st_ino) for file in (image.kernel.stat(), image.initrd.stat())}
    return bool(files & mounted) or any(directory in text for text in commands)


def _what_programs_use() -> tuple[set[bytes], set[tuple[int, int]]]:
    """The command lines of all programs; device and inode of what they have mounted of an image: a VMM in a jail knows
    its image by bind mounts only, and images of another cache may have the same names. Source: proc(5), mountinfo."""
    commands, mounted = set(), set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            commands.add((process / "cmdline").read_bytes())
            mounts = (process / "mountinfo").read_bytes().splitlines()
        except OSError:
            continue  # it has ended
        for mount in mounts:
            if f"/{IMAGES}/".encode() in mount:
                place = mount.split()[4].decode("unicode_escape").encode("latin-1")
                with contextlib.suppress(OSError):  # something else is mounted over it
                    found = os.stat(os.fsencode(process / "root") + place)
                    mounted.add((found.st_dev, found.st_ino))
    return commands, mounted
