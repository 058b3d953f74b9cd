"""Build the guest image: collect, plan, stage, pack, test-boot, switch the links."""

import errno
import hashlib
import inspect
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

import katapod
from katapod.host.guest_kernel import library_names
from katapod.model.errors import KatapodError
from katapod.model.flavour import Flavour, GuestVmm
from katapod.model.recipe import EMPTY_RECIPE, Recipe
from katapod.osbuilder.cache import (
    IMAGES,
    BuiltImage,
    Manifest,
    current_image,
    directory_name,
    install_image,
    locked_cache,
    read_image,
    switch_links,
    work_directory,
)
from katapod.osbuilder.errors import ImageNotProven, KernelUnusable, NoDirectBoot, OsbuilderError, SpaceMissing
from katapod.osbuilder.facts import collect_facts, find_programs, image_key
from katapod.osbuilder.guest_python import find_interpreter, find_own_sources
from katapod.osbuilder.kernel import InstalledKernel, find_kernel, find_uml_kernel, read_module_index
from katapod.osbuilder.node_files import collect_extras
from katapod.osbuilder.stage import COMPRESSORS, in_thread, run_dracut, stage_guest
from katapod.osbuilder.system_disk import make_system_disk
from katapod.osbuilder.vmlinux import extract_vmlinux
from katapod.plan.guest_image import plan_guest_image

__all__ = ["ImageRequest", "Progress", "Prove", "build_guest_image"]

Prove = Callable[[Path, Path], Awaitable[None] | None]
"""Boots (kernel, initrd); raises if the agent does not answer."""

Progress = Callable[[str, float], None]
"""Called before each step with its name and the fraction that is done, 0.0 to 1.0."""

SPACE_NEEDED = 300 * 1024 * 1024  # bytes: vmlinux, bzImage, staged files, dracut's copy of them, initrd


class ImageRequest(Struct, frozen=True):
    """What to build. The defaults are those of `kata-runtime image build`."""

    cache_dir: Path = Path("/var/cache/kata-containers")
    kernel: str | None = None
    """Path or version; None: the newest installed one."""
    compress: str = "lz4"
    """lz4, zstd, gzip or none. lz4 boots fastest: docs/adr/0004-guest-image.md."""
    packages: tuple[str, ...] = ("katapod.agent",)
    """Python packages to include in full, with everything that they import."""
    entry_point: str = "katapod.agent.main:main"
    """What the guest's init runs."""
    source_root: Path = Path(katapod.__file__).parent.parent
    """The directory that holds these packages."""
    direct_boot: bool = True
    """Try the uncompressed kernel (PVH) before the bzImage."""
    rebuild: bool = False
    """Build even if the image is up to date."""
    flavour: Flavour = "agent"
    """agent or systemd: what is process 1 in the guest."""
    vmm: GuestVmm = "qemu"
    """What the kernel runs in. For uml it is the distribution's, and `kernel` and `direct_boot` do not count."""
    recipe: Recipe = EMPTY_RECIPE
    """What is added to the image."""
    recipe_name: str = ""
    """Path of the recipe, for messages and the manifest."""
    system_root: Path = Path("/")
    """Where boot/ and lib/modules/ are looked for."""


# long: the steps of a build, in order
async def build_guest_image(
    request: ImageRequest, *, prove: Prove, progress: Progress = lambda step, done: None
) -> BuiltImage:
    """Return the guest image of `request`, built if any of its inputs has changed.

    Builders in one cache directory take turns. `prove` boots the finished image before it replaces the previous one.
    Raises OsbuilderError, MissingProgram or ModuleMissing; then, as after a cancellation, the previous image stays in
    use and nothing of the failed build is left.
    """
    if request.compress != "none" and request.compress not in COMPRESSORS:
        raise OsbuilderError(f"cannot compress the initrd by {request.compress}: use {', '.join(COMPRESSORS)} or none")
    progress("look at this node", 0.0)
    kernel = (
        find_uml_kernel(system_root=request.system_root)
        if request.vmm == "uml"
        else find_kernel(request.kernel, system_root=request.system_root)
    )
    index = read_module_index(kernel)
    interpreter = find_interpreter()
    own = find_own_sources(request.packages, request.source_root)
    programs = find_programs(interpreter)
    extras = await collect_extras(request.flavour, request.recipe, request.recipe_name)
    key = await image_key(
        kernel,
        index,
        interpreter,
        own,
        programs,
        extras,
        entry_point=request.entry_point,
        compress=request.compress + ("" if request.direct_boot else " bzimage"),
    )
    async with locked_cache(request.cache_dir):
        if not request.rebuild and (image := _up_to_date(request, kernel, key)):
            progress("up to date", 1.0)
            return image
        with _space_checked(request.cache_dir), work_directory(request.cache_dir) as work:
            progress("plan", 0.05)
            facts = await collect_facts(kernel, index, interpreter, own, programs, extras)
            plan = plan_guest_image(facts, entry_point=request.entry_point)
            finished = work / "finished"
            finished.mkdir()
            progress("unpack the kernel", 0.1)  # before what takes long: it may be broken
            candidates, notes = await in_thread(lambda: _kernel_files(request, kernel, finished))
            progress("lay out files", 0.15)
            await stage_guest(plan, kernel.module_dir, interpreter, work / "stage")
            progress("pack the initrd", 0.5)
            compress = "none" if kernel.vmm == "uml" else request.compress
            packed = await run_dracut(plan, work / "stage", work, compress=compress)
            if kernel.vmm == "uml":
                packed = await make_system_disk(packed, work)
            ending = "img" if kernel.vmm == "uml" else "initrd"
            initrd = packed.rename(finished / f"{_host_id()}-kata-{kernel.version}.{ending}")
            chosen, why_not = await _prove_one(candidates, initrd, prove, progress)
            told = (*plan.modules.warnings, *notes, *why_not)
            manifest = _manifest(request, key, kernel.version, chosen, initrd, told)
            if kernel.vmm == "uml":
                manifest = replace(manifest, pvh=False, **await _as_program(chosen))
            for other in candidates:
                if other != chosen:
                    other.unlink()
            progress("switch to it", 0.98)
            image = await in_thread(lambda: install_image(request.cache_dir, finished, manifest))
            switch_links(request.cache_dir, image)
        progress("done", 1.0)
        return replace(image, fresh=True)


def _manifest(
    request: ImageRequest, key: str, kernel_version: str, kernel: Path, initrd: Path, notes: tuple[str, ...]
) -> Manifest:
    return Manifest(
        key=key,
        kernel_version=kernel_version,
        kernel=kernel.name,
        kernel_size=kernel.stat().st_size,
        initrd=initrd.name,
        initrd_size=initrd.stat().st_size,
        pvh=kernel.name == "vmlinux",
        notes=notes,
        flavour=request.flavour,
        recipe=request.recipe_name,
        vmm=request.vmm,
    )


async def _as_program(kernel: Path) -> dict[str, Any]:
    """What the manifest says of a kernel that is run as a program."""
    return {
        "kernel_sha256": hashlib.sha256(kernel.read_bytes()).hexdigest(),
        "libraries": await library_names([kernel]),
    }


def _up_to_date(request: ImageRequest, kernel: InstalledKernel, key: str) -> BuiltImage | None:
    cache_dir = request.cache_dir
    image = current_image(cache_dir, request.flavour, kernel.vmm)
    if image is not None and image.key == key:
        return image
    # Built and proven before; the links have been moved to another kernel's image since.
    image = read_image(cache_dir / IMAGES / directory_name(kernel.version, request.flavour, kernel.vmm))
    if image is not None and image.key == key:
        switch_links(cache_dir, image)
        return image
    return None


def _kernel_files(
    request: ImageRequest, kernel: InstalledKernel, directory: Path
) -> tuple[list[Path], tuple[str, ...]]:
    """The kernel files to try, best first. They are copies, since an upgrade may remove the installed file."""
    if kernel.vmm == "uml":
        return [Path(shutil.copy(kernel.image, directory / "linux"))], ()
    candidates: list[Path] = []
    notes: tuple[str, ...] = ()
    if request.direct_boot:
        try:
            elf = extract_vmlinux(kernel.image)
            vmlinux = directory / "vmlinux"
            vmlinux.write_bytes(elf)
            candidates.append(vmlinux)
        except NoDirectBoot as exc:
            notes = (f"no direct boot: {exc}",)
    if kernel.image.read_bytes()[:4] != b"\x7fELF":
        candidates.append(Path(shutil.copyfile(kernel.image, directory / "vmlinuz")))
    if not candidates:
        raise KernelUnusable(f"cannot boot {kernel.image}: {'; '.join(notes)}")
    return candidates, notes


async def _prove_one(
    candidates: list[Path], initrd: Path, prove: Prove, progress: Progress
) -> tuple[Path, tuple[str, ...]]:
    """The first kernel file that boots, and why the ones before it did not."""
    failures: list[tuple[Path, KatapodError]] = []
    for kernel in candidates:
        progress(f"prove it by a boot ({kernel.name})", 0.75 + 0.1 * len(failures))
        try:
            answer = prove(kernel, initrd)
            if inspect.isawaitable(answer):
                await answer
        except KatapodError as exc:
            failures.append((kernel, exc))
            continue
        return kernel, tuple(f"no direct boot: {name.name} did not boot: {exc}" for name, exc in failures)
    told = "; ".join(f"{kernel.name}: {exc}" for kernel, exc in failures)
    raise ImageNotProven(
        f"cannot prove the guest image {initrd.name}: {told}", hint="the former image, if any, stays in use"
    ) from failures[-1][1]


@contextmanager
def _space_checked(cache_dir: Path) -> Iterator[None]:
    """Report a full file system as SpaceMissing, before the build if that is foreseeable.

    Programs do not report lack of space in a uniform way; so any failure counts as one if there is less space than a
    build needs once its own files have been removed.
    """

    def error() -> SpaceMissing:
        return SpaceMissing(
            f"cannot build the guest image in {cache_dir}: no space left",
            hint=f"the build needs {SPACE_NEEDED >> 20} MiB there",
        )

    def is_full() -> bool:
        return shutil.disk_usage(cache_dir).free < SPACE_NEEDED

    if is_full():
        raise error()
    try:
        yield
    except OsbuilderError as exc:
        if not isinstance(exc, ImageNotProven) and is_full():
            raise error() from exc
        raise
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise error() from exc
        raise OsbuilderError(f"cannot build the guest image in {cache_dir}: {exc}") from exc


def _host_id() -> str:
    """ID of os-release(5), used in the image's file name like "rhcos" in Kata's rhcos-kata-...."""
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        if os.path.isfile(path):
            for line in Path(path).read_text().splitlines():
                name, _, value = line.partition("=")
                cleaned = value.strip().strip("\"'")
                if name == "ID" and cleaned and all(c.isalnum() or c in "._-" for c in cleaned):
                    return cleaned
    return "linux"
