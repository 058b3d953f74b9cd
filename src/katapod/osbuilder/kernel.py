"""Find the kernels for guests, and their module directories."""

import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from katapod.model.flavour import GuestVmm
from katapod.osbuilder.errors import KernelMissing, KernelUnusable
from katapod.plan.guest_image import ModuleIndex, parse_module_index

__all__ = [
    "MODULE_ROOTS",
    "InstalledKernel",
    "find_kernel",
    "find_uml_kernel",
    "huge_pages_default",
    "kernel_release",
    "read_module_index",
]

INSTALL_HINT = "install a kernel: apt install linux-image-cloud-amd64"
UML_HINT = "install the package user-mode-linux (Debian 12, 13): apt install user-mode-linux"
UML_PROGRAM = "usr/bin/linux.uml"
MODULE_ROOTS: Mapping[GuestVmm, str] = {"qemu": "lib/modules", "uml": "usr/lib/uml/modules"}
"""Below the root directory: one directory for each version."""


class InstalledKernel(Struct, frozen=True):
    version: str  # as uname -r shows it in the guest
    image: Path  # a bzImage, or an ELF vmlinux; for uml a program
    module_dir: Path  # /lib/modules/VERSION
    vmm: GuestVmm = "qemu"


def find_kernel(override: str | None = None, *, system_root: Path = Path("/")) -> InstalledKernel:
    """The newest kernel installed on this node, or the one that `override` (a path or a version) names.

    A kernel counts if both its image and its modules are installed: Debian keeps the image in /boot/vmlinuz-V,
    Fedora and RHEL in /lib/modules/V/vmlinuz. Raises KernelMissing.
    """
    installed = _installed(system_root)
    if override is None:
        if not installed:
            raise KernelMissing(
                f"cannot find a kernel: none under {system_root / 'boot'} and {system_root / 'lib/modules'}",
                hint=INSTALL_HINT,
            )
        return max(installed, key=lambda kernel: _version_key(kernel.version))
    if "/" not in override:
        for kernel in installed:
            if kernel.version == override:
                return kernel
        names = ", ".join(sorted(kernel.version for kernel in installed)) or "none"
        raise KernelMissing(f"cannot find kernel {override}: installed are {names}", hint=INSTALL_HINT)
    return _from_path(Path(override), system_root)


def find_uml_kernel(*, system_root: Path = Path("/")) -> InstalledKernel:
    """The User-mode Linux that is installed on this node, as Debian's package has it. Raises KernelMissing."""
    program = system_root / UML_PROGRAM
    if not program.is_file():
        raise KernelMissing(f"cannot find User-mode Linux: there is no {program}", hint=UML_HINT)
    version = kernel_release(program)
    if not version:
        raise KernelUnusable(f"cannot tell the version of {program}: it is no kernel")
    module_dir = system_root / MODULE_ROOTS["uml"] / version
    if not (module_dir / "modules.dep").is_file():
        raise KernelMissing(f"cannot use {program}: its modules are not in {module_dir}", hint=UML_HINT)
    return InstalledKernel(version, program, module_dir, "uml")


def read_module_index(kernel: InstalledKernel) -> ModuleIndex:
    """Read kmod's data of `kernel`. Raises KernelMissing if depmod has not been run for it."""

    def content(name: str) -> str:
        path = kernel.module_dir / name
        return path.read_text(errors="replace") if path.is_file() else ""

    if not (kernel.module_dir / "modules.dep").is_file():
        raise KernelMissing(
            f"cannot read {kernel.module_dir / 'modules.dep'}: no such file", hint=f"run depmod {kernel.version}"
        )
    return parse_module_index(content("modules.dep"), content("modules.builtin"), content("modules.softdep"))


def huge_pages_default(kernel: InstalledKernel) -> str:
    """The kernel's default for transparent huge pages, "always" or "madvise"; empty if its configuration is not
    installed. Source: Linux mm/Kconfig."""
    for path in (kernel.image.with_name(f"config-{kernel.version}"), kernel.module_dir / "config"):
        if path.is_file():
            lines = path.read_text(errors="replace").splitlines()
            return next((m for m in ("always", "madvise") if f"CONFIG_TRANSPARENT_HUGEPAGE_{m.upper()}=y" in lines), "")
    return ""


def _installed(system_root: Path) -> Sequence[InstalledKernel]:
    found = []
    for module_dir in sorted((system_root / "lib/modules").glob("*/")):
        version = module_dir.name
        for image in (system_root / f"boot/vmlinuz-{version}", module_dir / "vmlinuz"):
            if image.is_file() and (module_dir / "modules.dep").is_file():
                found.append(InstalledKernel(version, image, module_dir))
                break
    return found


def _from_path(image: Path, system_root: Path) -> InstalledKernel:
    if not image.is_file():
        raise KernelMissing(f"cannot read kernel {image}: no such file")
    version = _version_inside(image)
    module_dir = system_root / "lib/modules" / version
    if not (module_dir / "modules.dep").is_file():
        raise KernelMissing(
            f"cannot use kernel {image}: its modules are not in {module_dir}",
            hint="install the modules of the same kernel build there and run depmod",
        )
    return InstalledKernel(version, image, module_dir)


def _version_inside(image: Path) -> str:
    """The release of a bzImage, from its header; of anything else from its name, vmlinu[xz]-VERSION."""
    with image.open("rb") as handle:
        if release := _release_in_header(handle.read(0x10000)):
            return release
    match = re.fullmatch(r"vmlinu[xz]-(.+)", image.name)
    if match is None:
        raise KernelUnusable(
            f"cannot tell the version of kernel {image}: it is not a bzImage and not named vmlinux-VERSION"
        )
    return match[1]


def kernel_release(image: Path) -> str:
    """The release (uname -r) of a bzImage or an ELF vmlinux; empty if the file does not have it. Raises OSError."""
    with image.open("rb") as handle:
        head = handle.read(0x10000)
        if head[:4] != b"\x7fELF":
            return _release_in_header(head)
        with mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ) as data:
            at = data.find(_BANNER)
            text = data[at + len(_BANNER) : at + 256] if at >= 0 else b""
            return text.split(b" ")[0].decode("ascii", errors="replace")


_BANNER = b"Linux version "
"""Only linux_banner begins so: linux init/version.c."""


def _release_in_header(head: bytes) -> str:
    """Of a bzImage, at offset 0x20e: linux Documentation/arch/x86/boot.rst."""
    if head[0x202:0x206] != b"HdrS":
        return ""
    (offset,) = struct.unpack_from("<H", head, 0x20E)
    text = head[offset + 0x200 : offset + 0x200 + 256].split(b"\0")[0].split(b" ")[0]
    return text.decode("ascii", errors="replace") if offset else ""


def _version_key(version: str) -> list[tuple[int, int, str]]:
    """Numbers compare as numbers; a release candidate (-rcN, ~rcN) comes before its release."""
    key: list[tuple[int, int, str]] = []
    for part in re.findall(r"\d+|[a-z]+", version.lower()):
        if part.isdigit():
            key.append((2, int(part), ""))
        else:
            key.append((0 if part == "rc" else 1, 0, part))
    return [*key, (1, -1, "")]
