"""Flavours of the guest image: what is process 1 in the guest, and where each flavour's files are."""

from typing import Literal, get_args

__all__ = ["FLAVOURS", "GUEST_IMAGE_ROOT", "Flavour", "initrd_link", "kernel_link"]

Flavour = Literal["agent", "systemd"]
"""agent: kata-agent is init. systemd: systemd is, and kata-agent is one of its services."""

FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
GUEST_IMAGE_ROOT = "/var/cache/kata-containers"


def kernel_link(flavour: Flavour) -> str:
    """File name of the link to the kernel, below the cache directory."""
    return "vmlinuz.container" if flavour == "agent" else f"vmlinuz-{flavour}.container"


def initrd_link(flavour: Flavour) -> str:
    """File name of the link to the initrd, below the cache directory."""
    return "kata-containers-initrd.img" if flavour == "agent" else f"kata-containers-initrd-{flavour}.img"
