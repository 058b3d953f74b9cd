"""The directory of finished images: lock, manifest, the atomic switch to a new image.

    CACHE/vmlinuz.container -> osbuilder-images/current/kernel
    CACHE/kata-containers-initrd.img -> osbuilder-images/current/initrd
    CACHE/osbuilder-images/current -> KERNELVERSION
    CACHE/osbuilder-images/KERNELVERSION/{ID-kata-KERNELVERSION.initrd, vmlinux, manifest.json, kernel, initrd}

Another flavour or VMM has its own links and directory (kata-containers-initrd-systemd.img, current-systemd,
KERNELVERSION+systemd; kata-containers-uml.img, current-uml, KERNELVERSION+uml), so that all can coexist.

Users open the two links. These lead through a third one, so that a single rename switches kernel and initrd together: a
crash never leaves a new kernel with an old initrd. An image of the same kernel version is exchanged as a whole
directory, which Linux does atomically.
"""

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from msgspec import Struct
from msgspec.structs import asdict

from katapod.host.hints import hint_for
from katapod.model.flavour import (
    FLAVOURS,
    GUEST_VMMS,
    Flavour,
    GuestVmm,
    image_suffix,
    initrd_link,
    kernel_link,
)
from katapod.osbuilder.errors import OsbuilderError

__all__ = [
    "BuiltImage",
    "Manifest",
    "current_image",
    "current_images",
    "directory_name",
    "install_image",
    "list_images",
    "locked_cache",
    "read_image",
    "remove_image",
    "switch_links",
    "work_directory",
]

IMAGES = "osbuilder-images"
MANIFEST_MAX = 1024 * 1024  # bytes

_WORK_PREFIX = ".building-"
_LOCK_POLL_S = 0.1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Manifest(Struct, frozen=True):
    """What manifest.json holds. Sizes in bytes; file names relative to its directory."""

    key: str
    kernel_version: str
    kernel: str
    kernel_size: int
    initrd: str  # for uml a system disk
    initrd_size: int
    pvh: bool
    notes: tuple[str, ...]  # what the image lacks, and why
    flavour: Flavour = "agent"
    recipe: str = ""  # path of its recipe; empty: none
    vmm: GuestVmm = "qemu"
    kernel_sha256: str = ""  # hexadecimal; of a kernel that is a program
    libraries: tuple[str, ...] = ()  # of the node, which such a program is run with, by the names that it is linked to


class BuiltImage(Struct, frozen=True):
    """A finished, proven guest image."""

    kernel: Path
    initrd: Path  # for uml a system disk
    kernel_version: str
    key: str
    size: int  # bytes of the initrd
    pvh: bool  # the kernel is an ELF file for direct boot; otherwise a bzImage
    notes: tuple[str, ...] = ()
    flavour: Flavour = "agent"
    recipe: str = ""
    vmm: GuestVmm = "qemu"
    kernel_sha256: str = ""
    libraries: tuple[str, ...] = ()
    fresh: bool = False  # built by this call; False: it was up to date


def directory_name(kernel_version: str, flavour: Flavour, vmm: GuestVmm = "qemu") -> str:
    """Where an image is, below osbuilder-images."""
    return kernel_version + image_suffix(flavour, vmm, "+")


def list_images(cache_dir: Path) -> list[BuiltImage]:
    """Every finished image, by directory name."""
    try:
        directories = sorted(path for path in (cache_dir / IMAGES).iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
    images = [read_image(path) for path in directories if not path.is_symlink() and path.name[0] != "."]
    return [image for image in images if image is not None]


def remove_image(cache_dir: Path, image: BuiltImage) -> None:
    """Remove an image that no link points to. Call with the lock held."""
    directory = image.kernel.parent
    aside = directory.with_name(_WORK_PREFIX + directory.name)  # the next builder removes it if we fail to
    directory.rename(aside)
    shutil.rmtree(aside)


def current_images(cache_dir: Path) -> tuple[BuiltImage, ...]:
    """The images in use, of each flavour and VMM."""
    found = (current_image(cache_dir, flavour, vmm) for vmm in GUEST_VMMS for flavour in FLAVOURS)
    return tuple(image for image in found if image is not None)


def current_image(cache_dir: Path, flavour: Flavour = "agent", vmm: GuestVmm = "qemu") -> BuiltImage | None:
    """The image that the links of `flavour` for `vmm` point to; None if there is none or it is incomplete."""
    kernel, initrd = cache_dir / kernel_link(flavour, vmm), cache_dir / initrd_link(flavour, vmm)
    try:
        directory = kernel.resolve(strict=True).parent
        if initrd.resolve(strict=True).parent != directory:
            return None
    except OSError:
        return None
    image = read_image(directory)
    if image is None or image.kernel != kernel.resolve() or image.initrd != initrd.resolve():
        return None
    return image


def read_image(directory: Path) -> BuiltImage | None:
    """The image in `directory`; None if its manifest or a file is missing, broken or of the wrong size."""
    try:
        with (directory / "manifest.json").open("rb") as handle:
            raw = json.loads(handle.read(MANIFEST_MAX))
        lists = {name: tuple(raw.get(name, ())) for name in ("notes", "libraries")}
        manifest = Manifest(**{**raw, **lists})
        kernel, initrd = directory / manifest.kernel, directory / manifest.initrd
        if manifest.flavour not in FLAVOURS or manifest.vmm not in GUEST_VMMS:
            return None
        if (kernel.stat().st_size, initrd.stat().st_size) != (manifest.kernel_size, manifest.initrd_size):
            return None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return BuiltImage(
        kernel,
        initrd,
        manifest.kernel_version,
        manifest.key,
        manifest.initrd_size,
        manifest.pvh,
        manifest.notes,
        manifest.flavour,
        manifest.recipe,
        manifest.vmm,
        manifest.kernel_sha256,
        manifest.libraries,
    )


@asynccontextmanager
async def locked_cache(cache_dir: Path) -> AsyncIterator[None]:
    """Be the only builder in `cache_dir`; waits for a running one to finish."""
    images = cache_dir / IMAGES
    try:
        images.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(images / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as exc:
        raise OsbuilderError(f"cannot write to {images}: {exc.strerror}", hint=hint_for(exc)) from exc
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def work_directory(cache_dir: Path) -> Iterator[Path]:
    """A temporary directory for the build, beside the images. Also removes what a killed builder left.

    Call with the lock held: then no directory of a running builder can be there.
    """
    images = cache_dir / IMAGES
    for stale in images.glob(f"{_WORK_PREFIX}*"):
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=_WORK_PREFIX, dir=images))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def install_image(cache_dir: Path, finished: Path, manifest: Manifest) -> BuiltImage:
    """Move the directory `finished` to its place and write its manifest. The links are not touched."""
    (finished / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    (finished / "kernel").symlink_to(manifest.kernel)
    (finished / "initrd").symlink_to(manifest.initrd)
    for path in finished.iterdir():
        if not path.is_symlink():
            path.chmod(0o755 if path.name == manifest.kernel and manifest.vmm == "uml" else 0o644)
            _sync(path)
    finished.chmod(0o755)
    _sync(finished)
    target = cache_dir / IMAGES / directory_name(manifest.kernel_version, manifest.flavour, manifest.vmm)
    if target.is_dir():
        _exchange(finished, target)
    else:
        finished.rename(target)
    _sync(target.parent)
    image = read_image(target)
    assert image is not None, "we have just written it"
    return image


def switch_links(cache_dir: Path, image: BuiltImage) -> None:
    """Point the links of `cache_dir` for the image's flavour and VMM to `image`, by one rename."""
    images = cache_dir / IMAGES
    current = f"current{image_suffix(image.flavour, image.vmm)}"
    _replace_link(images / current, image.kernel.parent.name)
    _replace_link(cache_dir / kernel_link(image.flavour, image.vmm), f"{IMAGES}/{current}/kernel")
    _replace_link(cache_dir / initrd_link(image.flavour, image.vmm), f"{IMAGES}/{current}/initrd")
    _sync(images)
    _sync(cache_dir)


def _replace_link(link: Path, target: str) -> None:
    if link.is_symlink() and os.readlink(link) == target:
        return
    fresh = link.with_name(f".{link.name}.new")
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()
    fresh.symlink_to(target)
    fresh.rename(link)


def _exchange(one: Path, other: Path) -> None:
    """Swap two directories. Source: renameat2(2), RENAME_EXCHANGE."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return
    error = ctypes.get_errno()
    if error not in (errno.EINVAL, errno.ENOSYS, errno.EXDEV):
        raise OSError(error, os.strerror(error), str(other))
    # The file system does not support the exchange: a moment without an image cannot be avoided.
    aside = one.with_name(one.name + ".former")
    other.rename(aside)
    one.rename(other)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
