"""`kata-runtime image build` and `image guest ...`: the images that VMs boot from."""

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from katapod.cli.command import HOST_PATH, flag, group, option, verb
from katapod.cli.interrupt import interruptible
from katapod.cli.settings import Globals, need_root
from katapod.cli.tables import Column, print_table, shown_size
from katapod.model.errors import DeviceMissing, NotFound, UsageError
from katapod.model.flavour import FLAVOURS, Flavour, initrd_link, kernel_link

if TYPE_CHECKING:
    from katapod.model.config import Config
    from katapod.osbuilder import ImageRequest

__all__ = ["build", "guest"]


@group(short_help="List, show and prune guest images.")
def guest() -> None:
    """The images that VMs boot from: one for each kernel and flavour."""


def _parse_flavour(text: str, configured: Flavour) -> Flavour:
    if not text:
        return configured
    for flavour in FLAVOURS:
        if text == flavour:
            return flavour
    raise UsageError(f"cannot use --flavour {text}: it is none of {', '.join(FLAVOURS)}")


@verb("build", short_help="Build the guest image: the kernel and initrd that VMs boot.")
@option("--kernel", metavar="VERSION|FILE", help="Kernel; default: the newest that is installed.")
@option("--flavour", metavar="agent|systemd", help="Process 1 of the guest; default: guest_flavour of [katapod].")
@option(
    "--recipe",
    metavar="FILE",
    type=HOST_PATH,
    help="What to add; default: /etc/kata-containers/image.toml if it is there.",
)
@flag("--no-recipe", help="Add nothing, whatever is in /etc.")
@flag("--rebuild", help="Build also if the image is up to date.")
@flag("-c", "--check", help="Accepted; a build is always only if needed.", expose_value=False)
@click.pass_obj
def build(settings: Globals, kernel: str, flavour: str, recipe: str, no_recipe: bool, rebuild: bool) -> int:
    """Build kernel and initrd for the guests from this machine's kernel, prove them by a boot, and use them.

    Does nothing when the image is up to date. Until the new one has been seen to boot, the former stays in use.
    Images of kernels that are no longer installed are removed, unless a VM uses them.
    """
    need_root("image build")
    if recipe and no_recipe:
        raise UsageError("cannot use --recipe with --no-recipe: choose one")

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
        await _build(request, config.qemu.path)
        await _choose_accelerator(settings, config, chosen)
        return 0

    return interruptible(go())


async def _build(request: "ImageRequest", qemu: str) -> None:
    """Build what is asked for, remove what nothing needs any more, and print both."""
    from katapod.cli.progress import step_progress
    from katapod.osbuilder import build_guest_image, prune_images
    from katapod.sandbox.proof import TCG_LIMIT_S, prove_boot
    from katapod.vmm.spec import Accelerator

    async def prove(kernel: Path, initrd: Path) -> None:
        # in the build's own directory, which the next build removes if we are killed
        await prove_boot(kernel, initrd, qemu, Accelerator.TCG, limit_s=TCG_LIMIT_S, scratch_parent=initrd.parent)

    with step_progress() as progress:
        built = await build_guest_image(request, prove=prove, progress=progress)
    done = "is built" if built.fresh else "is up to date"
    for note in built.notes if built.fresh else ():
        print(f"note: {note}", file=sys.stderr)
    what = "guest image" if request.flavour == "agent" else f"guest image with {request.flavour}"
    print(f"{what} for {built.kernel_version} {done}: {built.initrd} ({shown_size(built.size)})")
    if built.fresh and request.recipe_name:
        print(f"recipe: {request.recipe_name}")
    for removed in await prune_images(request.cache_dir):
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
@flag("--json", "as_json", help="Print JSON for programs.")
@click.pass_obj
def list_guests(settings: Globals, as_json: bool) -> None:
    """List the finished guest images; the one in use of each flavour is marked."""
    from katapod.osbuilder import current_image, list_images

    cache_dir = settings.layout.guest_image_root
    current = {image.initrd for flavour in FLAVOURS if (image := current_image(cache_dir, flavour))}
    images = list_images(cache_dir)
    if as_json:
        _print_json([{**asdict(image), "current": image.initrd in current} for image in images])
        return
    print_table(
        [
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
@option("--flavour", metavar="agent|systemd", help="Which one; default: guest_flavour of [katapod].")
@flag("--json", "as_json", help="Print JSON for programs.")
@click.pass_obj
def show(settings: Globals, flavour: str, as_json: bool) -> None:
    """Show the files, size and notes of the guest image in use."""
    from katapod.model.config import load_config
    from katapod.osbuilder import current_image

    config = load_config(Path(settings.config_file) if settings.config_file else None).config
    chosen = _parse_flavour(flavour, config.katapod.guest_flavour)
    image = current_image(settings.layout.guest_image_root, chosen)
    if image is None:
        raise NotFound(
            f"cannot show the guest image of flavour {chosen}: there is none",
            hint=f"kata-runtime image build --flavour {chosen}",
        )
    if as_json:
        _print_json({**asdict(image), "current": True})
        return
    for name, value in (
        ("flavour", image.flavour),
        ("kernel version", image.kernel_version),
        ("kernel", image.kernel),
        ("initrd", image.initrd),
        ("size", shown_size(image.size)),
        ("direct boot", "yes" if image.pvh else "no"),
        ("recipe", image.recipe or "none"),
        ("key", image.key),
        *(("note", note) for note in image.notes),
    ):
        print(f"{name + ':':16}{value}")


@guest.command("prune", short_help="Remove guest images that nothing uses.")
@flag("-a", "--all", "everything", help="Also those of installed kernels that are not in use.")
@click.pass_obj
def prune(settings: Globals, everything: bool) -> int:
    """Remove images of kernels that are no longer installed. Those in use, by a link or a VM, stay."""
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
