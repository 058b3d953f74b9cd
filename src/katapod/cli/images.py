"""`kata-runtime image`: container images (ls, import, pull, rm).

image_verbs.py has what is done with those of the store, guest_images.py the guest's image.
"""

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import click

from katapod.cli import image_verbs
from katapod.cli.command import HOST_PATH, argument, flag, group, option, repeatable
from katapod.cli.formats import print_rows, the_format
from katapod.cli.guest_images import build, guest
from katapod.cli.image_verbs import chosen_images, image_row
from katapod.cli.interrupt import interruptible
from katapod.cli.settings import Globals, need_root, print_error
from katapod.cli.tables import Column, print_table, shown_size
from katapod.model.errors import KatapodError, UsageError

__all__ = ["image", "list_images", "pull", "remove"]


TRANSPORTS = ("oci", "oci-archive", "docker-archive", "dir", "docker")


@group()
def image() -> None:
    """Manage container images, and the image that guests boot from."""


@image.command("ls", short_help="List container images.")
@flag("--json", "as_json", help="Print JSON.")
@flag("-q", "--quiet", help="Print only names.")
@flag("-a", "--all", "everything", help="Taken; there are no images between.")
@flag("--digests", help="Taken; DIGEST is always shown.")
@flag("--no-trunc", help="Taken; --format '{{.Digest}}' shows all of it.")
@repeatable("-f", "--filter", "wanted", metavar="K=V", help="Only those: reference=PATTERN, dangling=true.")
@the_format
@argument("name", required=False, metavar="[NAME]", help="Only images of that name, whatever their tag.")
@click.pass_obj
def list_images(settings: Globals, /, as_json: bool, quiet: bool, **flags: Any) -> None:
    """List the container images of the store. `busybox` is made when it is first run.

    The fields of --format are docker's: .Repository, .Tag, .ID, .Digest, .CreatedAt, .Size; and .Name.
    """
    need_root("image ls")
    records = asyncio.run(settings.image_store().list_images())
    rows = [(name, record) for record in records for name in (record.names or ("<none>",))]
    if flags["wanted"] or flags["name"] or flags["form"]:
        rows = chosen_images(rows, flags["name"] or "", flags["wanted"])
    if flags["form"]:
        columns = {"REPOSITORY": "Repository", "TAG": "Tag", "IMAGE ID": "ID", "SIZE": "Size"}
        print_rows([image_row(record, name) for name, record in rows], flags["form"], columns)
    elif as_json:
        import msgspec

        sys.stdout.write(msgspec.json.format(msgspec.json.encode(records), indent=2).decode() + "\n")
    elif quiet:
        for name, record in rows:
            if record.names:
                print(name)
    else:
        print_table(
            [
                Column("NAME", lambda row: row[0]),
                Column("DIGEST", lambda row: row[1].digest.removeprefix("sha256:")[:12]),
                Column("SIZE", lambda row: shown_size(row[1].size_bytes)),
                Column("CREATED", lambda row: f"{row[1].created:%Y-%m-%d %H:%M}"),
            ],
            rows,
        )


the_name = argument("name", required=False, help="Name in the store; default: made from the source.")


@image.command("import", short_help="Import an image from an archive or a directory.")
@argument(
    "source",
    type=HOST_PATH,
    help="oci:PATH[:TAG], oci-archive:FILE, docker-archive:FILE, dir:PATH; or a plain tar: FILE, or - for stdin.",
)
@the_name
@repeatable(
    "-c", "--change", "changes", metavar="LINE", help="Of a tar: CMD, ENV, ...: an instruction of a Dockerfile."
)
@option("-m", "--message", metavar="TEXT", help="Of a tar: a line of its history.")
@click.pass_obj
def import_image(settings: Globals, source: str, name: str | None, changes: tuple[str, ...], message: str) -> int:
    """Copy an image into the store, unpack it, and give it a name.

    A plain tar is a root file system, as export writes it; gzip, bzip2 or xz may have compressed it. Its digest is
    printed.
    """
    need_root("image import")
    if source == "-" or (source.partition(":")[0] not in TRANSPORTS and os.path.isfile(source)):
        return _import_tar(settings, source, name, changes, message)
    if changes or message:
        raise UsageError(
            "cannot use --change or --message: the image has a config of its own",
            hint="they are for a plain tar: kata-runtime import -c 'CMD [\"sh\"]' FILE NAME",
        )
    return _bring_in(settings, source, name)


def _import_tar(settings: Globals, source: str, name: str | None, changes: tuple[str, ...], message: str) -> int:
    from katapod.images.committing import base_config, import_root
    from katapod.model.image import SkopeoReference, Transport, parse_image_name, suggest_name
    from katapod.model.image_changes import apply_change

    if name is None and source == "-":
        raise UsageError("cannot import: a tar from standard input needs a name", hint="kata-runtime import - NAME")
    if source == "-" and os.isatty(0):
        raise UsageError("cannot read a tar from a terminal", hint="kata-runtime import FILE NAME")
    target = parse_image_name(name) if name else suggest_name(SkopeoReference(Transport.OCI_ARCHIVE, source))
    config: dict[str, Any] = {}
    for text in changes:
        apply_change(config, text)

    async def go() -> int:
        store = settings.image_store()
        document = {**base_config(store, ""), "config": config}
        with contextlib.ExitStack() as stack:
            handle = sys.stdin.buffer if source == "-" else stack.enter_context(open(source, "rb"))
            made = await import_root(store, handle, document, target.text, message or f"import of {source}")
        print(made.digest)
        return 0

    return interruptible(go())


@image.command("pull", short_help="Pull an image from a registry.")
@argument("source", metavar="[docker://][HOST/]NAME[:TAG]", type=HOST_PATH, help="The image.")
@the_name
@option("--tls-verify", metavar="true|false", help="Verify the registry's certificate; default: true.")
@option("--authfile", metavar="FILE", type=HOST_PATH, help="Credentials; default: skopeo's own.")
@click.pass_obj
def pull(settings: Globals, source: str, name: str | None, tls_verify: str, authfile: str) -> int:
    """Pull an image from a registry into the store; one without HOST from the registries of the configuration."""
    need_root("image pull")
    return _bring_in(settings, source, name, tls_verify=_parse_truth(tls_verify), authfile=authfile, pull=True)


def _parse_truth(text: str) -> bool | None:
    """As skopeo and podman write it: --tls-verify=false. None: not given."""
    if text not in ("", "true", "false"):
        raise UsageError(f"cannot use --tls-verify {text!r}: it must be true or false")
    return None if not text else text == "true"


def _bring_in(
    settings: Globals,
    source: str,
    name: str | None,
    *,
    tls_verify: bool | None = None,
    authfile: str = "",
    pull: bool = False,
) -> int:
    from katapod.cli.progress import image_progress
    from katapod.images import Access

    registries = settings.load_config(need_files=False).katapod.registries if pull else None
    access = Access(tls_verify=tls_verify, authfile=Path(authfile) if authfile else None, registries=registries)

    async def go() -> int:
        store = settings.image_store()
        with image_progress() as progress:
            bring = store.pull if pull else store.import_image
            record = await bring(source, name, access=access, progress=progress)
        print(f"{', '.join(record.names)}  {record.digest}")
        return 0

    return interruptible(go())


@image.command("rm", short_help="Remove images.")
@argument("names", nargs=-1, required=True, metavar="NAME...", help="Names of images.")
@flag("-f", "--force", help="One that is not there is no error. Containers keep what they use.")
@click.pass_obj
def remove(settings: Globals, names: tuple[str, ...], force: bool) -> int:
    """Remove names from the store. Data is removed with its last name, once no container uses it."""
    need_root("image rm")
    from katapod.images import ImageNotFound

    async def go() -> int:
        failed = 0
        for name in names:
            try:
                print(f"Untagged: {await settings.image_store().remove(name)}")
            except KatapodError as exc:
                if force and isinstance(exc, ImageNotFound):
                    continue
                failed = 1
                print_error(exc)
        return failed

    return interruptible(go())


for each in (image_verbs.inspect, image_verbs.history, image_verbs.tag, image_verbs.save, image_verbs.load):
    image.add_command(each)
image.add_command(image_verbs.prune)
image.add_command(build)
image.add_command(guest)
