"""`kata-runtime image build` and `image guest ...`: the images that VMs boot from."""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec.structs import asdict, replace

from katapod.cli.command import HOST_PATH, flag, group, option, verb
from katapod.cli.interrupt import interruptible
from katapod.cli.settings import Globals, need_root
from katapod.cli.tables import Column, print_table, shown_size
from katapod.model.errors import DeviceMissing, KatapodError, NotFound, UsageError
from katapod.model.flavour import FLAVOURS, GUEST_VMMS, Flavour, GuestVmm, initrd_link, kernel_link

if TYPE_CHECKING:
    from katapod.model.config import Config
    from katapod.osbuilder import BuiltImage, ImageRequest, Prove

__all__ = ["build", "guest"]


@group(short_help="List, show and prune guest images.")
def guest() -> None:
    """Manage the images that VMs boot from, one for each kernel and flavour."""


def _parse_flavour(text: str, configured: Flavour) -> Flavour:
    if not text:
        return configured
    for flavour in FLAVOURS:
        if text == flavour:
            return flavour
    raise UsageError(f"cannot use --flavour {text}: it must be {' or '.join(FLAVOURS)}")


def _parse_vmm(text: str) -> GuestVmm | None:
    """None for no text."""
    for vmm in GUEST_VMMS:
        if text == vmm:
            return vmm
    if text:
        raise UsageError(f"cannot use --vmm {text}: it must be {' or '.join(GUEST_VMMS)}")
    return None


@verb("build", short_help="Build the guest images: the kernels and root file systems that VMs boot.")
@option("--vmm", metavar="qemu|uml", help="Build only the image for QEMU or User-mode Linux; default: both.")
@option("--kernel", metavar="VERSION|FILE", help="Kernel for QEMU; default: the newest installed.")
@option("--flavour", metavar="agent|systemd", help="Process 1 of the guest; default: guest_flavour of [katapod].")
@option(
    "--recipe",
    metavar="FILE",
    type=HOST_PATH,
    help="Recipe of what to add; default: /etc/kata-containers/image.toml if it exists.",
)
@flag("--no-recipe", help="Add nothing, even if there is a recipe in /etc.")
@flag("--rebuild", help="Build even if the image is up to date.")
@flag("-c", "--check", help="Accepted for compatibility; nothing is built without need.", expose_value=False)
@click.pass_obj
def build(settings: Globals, vmm: str, kernel: str, flavour: str, recipe: str, no_recipe: bool, rebuild: bool) -> int:
    """Build the guests' kernel and initrd from this machine's kernel and, if the package user-mode-linux is installed,
    kernel and system disk for User-mode Linux; test each with a boot, and use it.

    Does nothing for an image that is up to date. The old image stays in use until the new one has booted. Images of
    kernels that are no longer installed are removed unless a VM uses them.
    """
    need_root("image build")
    if recipe and no_recipe:
        raise UsageError("cannot use --recipe with --no-recipe: choose one")
    only = _parse_vmm(vmm)
    if kernel and only == "uml":
        raise UsageError("cannot use --kernel with --vmm uml: its kernel is the one of the package user-mode-linux")

    async def go() -> int:
        from katapod.model.config import load_config
        from katapod.osbuilder import ImageRequest, read_recipe

        config = load_config(Path(settings.config_file) if settings.config_file else None).config
        chosen = _parse_flavour(flavour, config.katapod.guest_flavour)
        parsed, recipe_name = read_recipe(Path(recipe) if recipe else None, none=no_recipe)
        request = ImageRequest(
            kernel=kernel or None,
            cache_dir=settings.layout.guest_image_root,
            flavour=chosen,
            recipe=parsed,
            recipe_name=recipe_name,
            rebuild=rebuild,
        )
        if only != "uml":
            await _build(request, _prover_in_qemu(config.qemu.path))
        if only != "qemu":
            await _build_for_uml(replace(request, vmm="uml", kernel=None), needed=only == "uml")
        await _prune(request.cache_dir)
        if only != "uml":
            await _choose_accelerator(settings, config, chosen)
        return 0

    return interruptible(go())


def _prover_in_qemu(qemu: str) -> "Prove":
    from katapod.sandbox.proof import TCG_LIMIT_S, prove_boot
    from katapod.vmm.spec import Accelerator

    async def prove(kernel: Path, initrd: Path) -> None:
        # in the build's own directory, which the next build removes if we are killed
        await prove_boot(kernel, initrd, qemu, Accelerator.TCG, limit_s=TCG_LIMIT_S, scratch_parent=initrd.parent)

    return prove


async def _build_for_uml(request: "ImageRequest", *, needed: bool) -> None:
    """If it is not `needed`, what keeps this node from it is only a note: guests run in QEMU then."""
    from katapod.osbuilder import ImageNotProven, KernelMissing, KernelUnusable, prove_uml
    from katapod.plan.guest_image import ModuleMissing

    try:
        await _build(request, prove_uml)
    except (ImageNotProven, KernelMissing, KernelUnusable, ModuleMissing) as exc:
        if needed:
            raise
        print(f"note: no guest image for User-mode Linux: {_with_hint(exc)}", file=sys.stderr)


def _with_hint(error: KatapodError) -> str:
    return f"{error} ({error.hint})" if error.hint else str(error)


async def _build(request: "ImageRequest", prove: "Prove") -> None:
    """Build what is asked for, and say so."""
    from katapod.cli.progress import step_progress
    from katapod.osbuilder import build_guest_image

    with step_progress() as progress:
        built = await build_guest_image(request, prove=prove, progress=progress)
    done = "is built" if built.fresh else "is up to date"
    for note in built.notes if built.fresh else ():
        print(f"note: {note}", file=sys.stderr)
    what = "guest image" if request.flavour == "agent" else f"guest image with {request.flavour}"
    what += " for User-mode Linux" if request.vmm == "uml" else " for"
    print(f"{what} {built.kernel_version} {done}: {built.initrd} ({shown_size(built.size)})")
    if built.fresh and request.recipe_name:
        print(f"recipe: {request.recipe_name}")


async def _prune(cache_dir: Path) -> None:
    """Remove what nothing needs any more, and say so."""
    from katapod.osbuilder import prune_images

    for removed in await prune_images(cache_dir):
        print(f"removed the image of kernel {removed.kernel_version}, which is no longer installed")


async def _choose_accelerator(settings: Globals, config: "Config", flavour: Flavour) -> None:
    """Find out now which accelerator boots the image, so that the first container need not wait for that."""
    from katapod.host.facts import collect_host_facts
    from katapod.sandbox.proof import choose_accelerator, wanted_accelerator, with_guest

    layout = settings.layout
    root = layout.guest_image_root
    config = with_guest(config, root / kernel_link(flavour), root / initrd_link(flavour))
    wanted = wanted_accelerator(config)
    with tempfile.TemporaryDirectory(prefix="katapod-proof-") as scratch:
        try:
            found = await choose_accelerator(wanted, config, collect_host_facts(), layout.proof_file, Path(scratch))
        except DeviceMissing as exc:  # KVM is wanted in any case; the image is built all the same
            print(f"note: {exc} ({exc.hint})", file=sys.stderr)
            return
    if found.fresh:
        print(f"accelerator: {found.accelerator.value} ({found.reason})")
        if found.advice:
            print(f"note: {found.advice}", file=sys.stderr)


@guest.command("ls", short_help="List guest images.")
@flag("--json", "as_json", help="Print JSON.")
@click.pass_obj
def list_guests(settings: Globals, as_json: bool) -> None:
    """List the guest images; the one in use for each VMM and flavour is marked."""
    from katapod.osbuilder import current_images, list_images

    cache_dir = settings.layout.guest_image_root
    current = {image.initrd for image in current_images(cache_dir)}
    images = list_images(cache_dir)
    if as_json:
        _print_json([{**asdict(image), "current": image.initrd in current} for image in images])
        return
    print_table(
        [
            Column("VMM", lambda image: image.vmm),
            Column("FLAVOUR", lambda image: image.flavour),
            Column("KERNEL", lambda image: image.kernel_version),
            Column("IN USE", lambda image: "yes" if image.initrd in current else "no"),
            Column("SIZE", lambda image: shown_size(image.size)),
            Column("BOOTS", lambda image: image.kernel.name),
            Column("RECIPE", lambda image: image.recipe or "-"),
        ],
        images,
    )


@guest.command("show", short_help="Show the guest image in use.")
@option("--flavour", metavar="agent|systemd", help="Flavour; default: guest_flavour of [katapod].")
@option("--vmm", metavar="qemu|uml", help="VMM that the image is for; default: qemu.")
@flag("--json", "as_json", help="Print JSON.")
@click.pass_obj
def show(settings: Globals, flavour: str, vmm: str, as_json: bool) -> None:
    """Show the files, size and notes of the guest image in use."""
    from katapod.model.config import load_config
    from katapod.osbuilder import current_image

    config = load_config(Path(settings.config_file) if settings.config_file else None).config
    chosen = _parse_flavour(flavour, config.katapod.guest_flavour)
    of_vmm = _parse_vmm(vmm) or "qemu"
    image = current_image(settings.layout.guest_image_root, chosen, of_vmm)
    if image is None:
        raise NotFound(
            f"cannot show the guest image of flavour {chosen} for {of_vmm}: there is none",
            hint=f"kata-runtime image build --flavour {chosen}" + (" --vmm uml" if of_vmm == "uml" else ""),
        )
    if as_json:
        _print_json({**asdict(image), "current": True})
        return
    for name, value in (
        ("vmm", image.vmm),
        ("flavour", image.flavour),
        ("kernel version", image.kernel_version),
        ("kernel", image.kernel),
        *_of_vmm(image),
        ("size", shown_size(image.size)),
        ("recipe", image.recipe or "none"),
        ("key", image.key),
        *(("note", note) for note in image.notes),
    ):
        print(f"{name + ':':16}{value}")


def _of_vmm(image: "BuiltImage") -> list[tuple[str, object]]:
    if image.vmm == "uml":
        libraries = [("library", library) for library in image.libraries]
        return [("kernel sha256", image.kernel_sha256), *libraries, ("system disk", image.initrd)]
    return [("initrd", image.initrd), ("direct boot", "yes" if image.pvh else "no")]


@guest.command("prune", short_help="Remove guest images that nothing uses.")
@flag("-a", "--all", "everything", help="Also remove unused images of installed kernels.")
@click.pass_obj
def prune(settings: Globals, everything: bool) -> int:
    """Remove images of kernels that are no longer installed. Those in use, by a link or a VM, are kept."""
    need_root("image guest prune")
    cache_dir = settings.layout.guest_image_root

    async def go() -> int:
        from katapod.osbuilder import prune_images

        for image in await prune_images(cache_dir, also_installed=everything):
            print(image.kernel.parent)
        return 0

    return interruptible(go())


def _print_json(value: object) -> None:
    import msgspec

    encoded = msgspec.json.encode(value, enc_hook=str)
    sys.stdout.write(msgspec.json.format(encoded, indent=2).decode() + "\n")
