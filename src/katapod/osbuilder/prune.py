"""Remove guest images that are no longer needed."""

import logging
from pathlib import Path

from katapod.model.flavour import FLAVOURS
from katapod.osbuilder.cache import BuiltImage, current_image, list_images, locked_cache, remove_image

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
        current = {image.initrd for flavour in FLAVOURS if (image := current_image(cache_dir, flavour))}
        candidates = [
            image
            for image in list_images(cache_dir)
            if image.initrd not in current
            and (also_installed or not (system_root / "lib/modules" / image.kernel_version).is_dir())
        ]
        running = _command_lines() if candidates else ()
        for image in candidates:
            directory = f"{image.kernel.parent}/".encode()
            if any(directory in line for line in running):
                log.info("the image in %s is kept: a VM runs from it", image.kernel.parent)
                continue
            remove_image(cache_dir, image)
            removed.append(image)
    return removed


def _command_lines() -> list[bytes]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes())
        except OSError:
            continue  # it has ended
    return lines
