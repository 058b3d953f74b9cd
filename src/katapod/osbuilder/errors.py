"""Errors of the image builder.

    OsbuilderError            anything that keeps the guest image from being built
    |-- KernelMissing         no kernel is installed, or not the requested one
    |-- KernelUnusable        the kernel file is broken or has an unknown format
    |   `-- NoDirectBoot      it looks intact, but QEMU can only boot its bzImage
    |-- SpaceMissing          the cache directory's file system is full (also a NoSpace)
    `-- ImageNotProven        the image was built but did not boot; the previous one stays in use

A program that is not installed is a MissingProgram whose hint names Debian's package; a kernel without
the modules that a guest needs is plan.guest_image.ModuleMissing (both HostLacks).
"""

from katapod.model.errors import KatapodError, NoSpace

__all__ = ["ImageNotProven", "KernelMissing", "KernelUnusable", "NoDirectBoot", "OsbuilderError", "SpaceMissing"]


class OsbuilderError(KatapodError):
    """The guest image cannot be built."""


class KernelMissing(OsbuilderError):
    """No kernel is installed on this node, or not the requested one."""


class KernelUnusable(OsbuilderError):
    """A kernel file is broken or has an unknown format."""


class NoDirectBoot(KernelUnusable):
    """There is no uncompressed kernel that QEMU can enter directly. Never leaves this room."""


class SpaceMissing(OsbuilderError, NoSpace):
    """The file system of the cache directory is full."""


class ImageNotProven(OsbuilderError):
    """The image was built, but it did not boot."""
