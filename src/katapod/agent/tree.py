"""Removal of the agent's own small directories, which a container may have written to."""

from __future__ import annotations

import os

from katapod.kernel.trees import remove_tree

__all__ = ["remove_bundle"]


def remove_bundle(directory: str) -> None:
    """Remove a bundle. Its rootfs goes first and must be empty: if it were still mounted, this would delete the image.
    Raises OSError."""
    rootfs = f"{directory}/rootfs"
    if os.path.lexists(rootfs):
        os.rmdir(rootfs)
    remove_tree(directory)
