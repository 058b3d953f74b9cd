"""`image inspect`, `history`, `tag`, `prune`, `save`, `load`: images that are in the store."""

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import click

from katapod.cli.asking import agreed
from katapod.cli.command import HOST_PATH, argument, flag, option, verb
from katapod.cli.formats import print_each, print_rows, the_format
from katapod.cli.interrupt import interruptible
from katapod.cli.outputs import opened_output
from katapod.cli.settings import Globals, need_root, print_error
from katapod.cli.tables import shown_size
from katapod.model.errors import KatapodError, UsageError

if TYPE_CHECKING:
    from katapod.images import ImageStore
    from katapod.model.image import ImageRecord

__all__ = [
    "chosen_images",
    "history",
    "image_document",
    "image_row",
    "inspect",
    "load",
    "prune",
    "prune_images",
    "save",
    "tag",
]


def image_row(record: "ImageRecord", name: str) -> dict[str, Any]:
    """Docker's columns of `images`; all are text."""
    repository, _, tag = name.rpartition(":") if ":" in name.rpartition("/")[2] else (name, "", "<none>")
    return {
        "Name": name,
        "Repository": repository or "<none>",
        "Tag": tag,
        "ID": record.digest.removeprefix("sha256:")[:12],
        "Digest": record.digest,
        "CreatedAt": f"{record.created:%Y-%m-%d %H:%M:%S %z}",
        "Size": shown_size(record.size_bytes),
    }


def image_document(record: "ImageRecord") -> dict[str, Any]:
    """What `docker image inspect` prints."""
    config = record.config
    return {
        "Id": record.digest,
        "RepoTags": list(record.names),
        "Created": record.created.isoformat(),
        "Size": record.size_bytes,
        "Os": config.platform.os,
        "Architecture": config.platform.architecture,
        "Source": record.source,
        "Config": {
            "Entrypoint": list(config.entrypoint) or None,
            "Cmd": list(config.cmd) or None,
            "Env": list(config.env),
            "WorkingDir": config.working_dir,
            "User": config.user,
            "StopSignal": config.stop_signal,
            "ExposedPorts": {port: {} for port in config.exposed_ports},
            "Volumes": {path: {} for path in config.volumes},
            "Labels": config.labels,
        },
        "RootFS": {"Type": "layers", "Layers": list(config.diff_ids)},
    }


def chosen_images(
    rows: "list[tuple[str, ImageRecord]]", name: str, filters: tuple[str, ...]
) -> "list[tuple[str, ImageRecord]]":
    """Of (name, image) those of a repository, and those that all filters let pass. Raises UsageError."""
    import fnmatch

    if name:
        rows = [row for row in rows if _is_named(row[0], name)]
    for text in filters:
        key, _, value = text.partition("=")
        if key == "reference":
            rows = [row for row in rows if fnmatch.fnmatch(row[0], value) or _is_named(row[0], value)]
        elif key == "dangling" and value in ("true", "false"):
            rows = [row for row in rows if (not row[1].names) is (value == "true")]
        elif key == "label":
            label, equals, wanted = value.partition("=")
            rows = [
                row
                for row in rows
                if label in row[1].config.labels and (not equals or row[1].config.labels[label] == wanted)
            ]
        else:
            raise UsageError(
                f"cannot use --filter {text!r}: known are reference, dangling and label",
                hint="for example: --filter reference=debian:*",
            )
    return rows


def _is_named(full: str, name: str) -> bool:
    repository = full.rpartition(":")[0] or full
    return any(one == name or one.endswith(f"/{name}") for one in (full, repository))


the_images = argument("names", nargs=-1, required=True, metavar="NAME...", help="Names of images.")


async def _stored(store: "ImageStore", name: str) -> "ImageRecord":
    """Raises UsageError for a reference: nothing is brought in here; ImageNotFound."""
    from katapod.model.image import StoredName, parse_image_ref

    if not isinstance(parse_image_ref(name), StoredName):
        raise UsageError(f"cannot use {name}: it is a reference, not the name of a stored image")
    return await store.resolve(name)


@verb("inspect")
@the_images
@option("-f", "--format", "form", metavar="TEMPLATE", help="Go template for each; json: a line each.")
@click.pass_obj
def inspect(settings: Globals, names: tuple[str, ...], form: str) -> int:
    """Print images as JSON, in Docker's words. One that is not there is told of, and the others are printed."""
    need_root("image inspect")
    from katapod.images import ImageNotFound

    failed, found = 0, list[dict[str, Any]]()

    async def go() -> None:
        nonlocal failed
        store = settings.image_store()
        for name in names:
            try:
                found.append(image_document(await _stored(store, name)))
            except ImageNotFound as exc:
                failed = 1
                print_error(exc)

    asyncio.run(go())
    if form:
        print_each(found, form)
    else:
        print(json.dumps(found, indent=4))
    return failed


@verb("history")
@argument("name", metavar="NAME", help="Name of an image.")
@flag("-q", "--quiet", help="Print only when each step was made.")
@flag("--no-trunc", "whole", help="Do not shorten what made a step.")
@flag("-H", "--human", help="Taken; sizes of layers are not known, since images are kept unpacked.", default=True)
@the_format
@click.pass_obj
def history(settings: Globals, name: str, quiet: bool, whole: bool, human: bool, form: str) -> None:
    """Show how an image was made, the last step first."""
    need_root("history")
    store = settings.image_store()
    record = asyncio.run(_stored(store, name))
    with contextlib.suppress(ValueError):
        steps = json.loads(store.config_bytes(record.digest)).get("history") or []
        rows = [
            {
                "Created": str(step.get("created", ""))[:19],
                "CreatedBy": _cut(str(step.get("created_by", "")), whole),
                "Comment": str(step.get("comment", "")),
            }
            for step in reversed(steps)
            if isinstance(step, dict)
        ]
        if quiet:
            for row in rows:
                print(row["Created"])
        else:
            print_rows(rows, form, {"CREATED": "Created", "CREATED BY": "CreatedBy", "COMMENT": "Comment"})


def _cut(text: str, whole: bool) -> str:
    return text if whole or len(text) <= 45 else text[:42] + "..."


@verb("tag")
@argument("source", metavar="NAME", help="Name of an image.")
@argument("target", metavar="NEW-NAME", help="One more name for it.")
@click.pass_obj
def tag(settings: Globals, source: str, target: str) -> None:
    """Give an image one more name."""
    need_root("tag")
    asyncio.run(settings.image_store().tag(source, target))


@verb("prune")
@flag("-f", "--force", help="Do not ask.")
@flag("-a", "--all", "everything", help="Images with a name, too.")
@click.pass_obj
def prune(settings: Globals, force: bool, everything: bool) -> int:
    """Remove images that no container has. Without --all that is nothing: those without a name go by themselves."""
    need_root("image prune")
    return interruptible(prune_images(settings, force=force, everything=everything))


async def prune_images(settings: Globals, *, force: bool, everything: bool) -> int:
    store = settings.image_store()
    unused = [each for each in await store.list_images() if not store.users(each.digest)] if everything else []
    freed = sum(each.size_bytes for each in unused)
    if unused and not agreed(f"remove {len(unused)} images of {shown_size(freed)}?", force):
        return 1
    for each in unused:
        for name in each.names:
            print(await store.remove(name))
    print(f"Total reclaimed space: {shown_size(freed)}")
    return 0


@verb("save")
@the_images
@option("-o", "--output", metavar="FILE", type=HOST_PATH, help="Write to FILE; default: standard output.")
@click.pass_obj
def save(settings: Globals, names: tuple[str, ...], output: str) -> int:
    """Write images to an archive that docker load, podman load and image load read: each with one layer."""
    need_root("image save")
    if not output and os.isatty(1):
        raise UsageError("cannot write an archive to a terminal", hint=f"kata-runtime image save -o FILE {names[0]}")

    async def go() -> int:
        from katapod.images.saving import save_images
        from katapod.model.image import parse_image_name

        store = settings.image_store()
        chosen: dict[str, tuple[ImageRecord, list[str]]] = {}
        for name in names:
            record = await _stored(store, name)
            chosen.setdefault(record.digest, (record, []))[1].append(parse_image_name(name).text)
        with opened_output(output) as handle:
            await save_images(store, [(record, tuple(given)) for record, given in chosen.values()], handle)
        return 0

    return interruptible(go())


@verb("load")
@option("-i", "--input", "source", metavar="FILE", type=HOST_PATH, help="Archive; default: standard input.")
@flag("-q", "--quiet", help="Show no progress.")
@click.pass_obj
def load(settings: Globals, source: str, quiet: bool) -> int:
    """Bring in the images of an archive of docker save or podman save, under the names that they have there."""
    need_root("image load")
    if not source and os.isatty(0):
        raise UsageError("cannot read an archive from a terminal", hint="kata-runtime image load -i FILE")

    async def go() -> int:
        store = settings.image_store()
        with tempfile.TemporaryDirectory(prefix="kata-load-") as scratch:
            path = source
            if not path:
                path = f"{scratch}/archive.tar"
                with open(path, "wb") as copy:
                    await asyncio.to_thread(shutil.copyfileobj, sys.stdin.buffer, copy)
            return await _load(store, path)

    return interruptible(go())


async def _load(store: "ImageStore", path: str) -> int:
    import tarfile

    if ":" in path:
        raise UsageError(f"cannot load {path}: its name has a colon", hint="kata-runtime image load < FILE")
    try:
        with tarfile.open(path) as archive:
            names = set(archive.getnames())
            docker = "manifest.json" in names
            manifest = json.load(archive.extractfile("manifest.json") or sys.stdin) if docker else []
    except (OSError, tarfile.TarError, ValueError) as exc:
        raise UsageError(f"cannot load {path}: {exc}") from exc
    tags = [name for entry in manifest if isinstance(entry, dict) for name in entry.get("RepoTags") or ()]
    sources = [f"docker-archive:{path}:{name}" for name in tags] if tags else []
    sources = sources or [f"docker-archive:{path}" if docker else f"oci-archive:{path}"]
    failed = 0
    for each in sources:
        try:
            record = await store.import_image(each)
            print(f"Loaded image: {each.removeprefix(f'docker-archive:{path}:') if tags else record.names[0]}")
        except KatapodError as exc:
            failed = 1
            print_error(exc)
    return failed
