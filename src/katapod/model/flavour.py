"""Flavours of the guest image: what is process 1 in the guest, for which VMM, and where the files of each are."""

from typing import Literal, get_args

__all__ = [
    "FLAVOURS",
    "GUEST_IMAGE_ROOT",
    "GUEST_VMMS",
    "UML_ROOT",
    "Flavour",
    "GuestVmm",
    "image_suffix",
    "initrd_link",
    "kernel_link",
]

Flavour = Literal["agent", "systemd"]
"""agent: kata-agent is init. systemd: systemd is, and kata-agent is one of its services."""

GuestVmm = Literal["qemu", "uml"]
"""What runs an image's kernel: QEMU boots one of the processor, with an initrd; User-mode Linux is a kernel that is a
program, with a system disk."""

FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
GUEST_VMMS: tuple[GuestVmm, ...] = get_args(GuestVmm)
GUEST_IMAGE_ROOT = "/var/cache/kata-containers"

UML_ROOT = ("root=/dev/ubda", "rootfstype=ext4", "ro", "init=/init")
"""Kernel parameters of a guest whose system disk is its first one, ubd0r=FILE. It is read-only; the agent covers it."""


def image_suffix(flavour: Flavour, vmm: GuestVmm, separator: str = "-") -> str:
    """What names of files and directories add for this image; nothing for the agent's in QEMU."""
    words = [word for word, usual in ((vmm, "qemu"), (flavour, "agent")) if word != usual]
    return "".join(f"{separator}{word}" for word in words)


def kernel_link(flavour: Flavour, vmm: GuestVmm = "qemu") -> str:
    """File name of the link to the kernel, below the cache directory."""
    return f"vmlinuz{image_suffix(flavour, vmm)}.container"


def initrd_link(flavour: Flavour, vmm: GuestVmm = "qemu") -> str:
    """File name of the link to the initrd, or to the system disk for uml, below the cache directory."""
    kind = "" if vmm == "uml" else "-initrd"
    return f"kata-containers{kind}{image_suffix(flavour, vmm)}.img"
