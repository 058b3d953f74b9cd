"""Removal of the agent's own small folders. (shutil would do it, for the price of bz2, lzma and zlib.)"""

from __future__ import annotations

import os

__all__ = ["remove", "remove_bundle"]


def remove(folder: str) -> None:
    """Remove a folder and all in it; links are removed, not followed. Raises OSError."""
    for parent, folders, names in os.walk(folder, topdown=False):
        for name in names:
            os.unlink(f"{parent}/{name}")
        for name in folders:
            path = f"{parent}/{name}"
            if os.path.islink(path):
                os.unlink(path)
            else:
                os.rmdir(path)
    os.rmdir(folder)


def remove_bundle(folder: str) -> None:
    """Remove a bundle. Its rootfs goes first and must be empty: if it were still mounted, going on would
    delete the image. Raises OSError."""
    rootfs = f"{folder}/rootfs"
    if os.path.lexists(rootfs):
        os.rmdir(rootfs)
    remove(folder)
