"""`commit`: an image of a container's files."""

from typing import TYPE_CHECKING, Any, BinaryIO

import click

from katapod.cli.command import argument, flag, option, repeatable, verb
from katapod.cli.copying import export_files
from katapod.cli.settings import Globals, need_root
from katapod.model.ids import parse_container_name

if TYPE_CHECKING:
    from katapod.model import oci
    from katapod.model.record import ContainerRecord

__all__ = ["commit"]


@verb("commit")
@argument("name", metavar="NAME", help="Name of a running container.")
@argument("image", metavar="IMAGE[:TAG]", help="Name of the image that is made.")
@option("-a", "--author", metavar="TEXT", help="Author of the image.")
@option("-m", "--message", metavar="TEXT", help="What was changed: a line of its history.")
@repeatable("-c", "--change", "changes", metavar="LINE", help="CMD, ENV, LABEL, ...: an instruction of a Dockerfile.")
@flag("-p", "--pause", help="Taken: the container is not paused, since a tar in it reads its files.")
@flag("-q", "--quiet", help="Say nothing but the image's digest, as is the case.")
@click.pass_obj
def commit(settings: Globals, /, name: str, image: str, **flags: Any) -> int:
    """Make an image of the files of a running container, and print its digest.

    It has one layer, without what is mounted in the container, and the container's command, environment, user and
    working directory. The container needs a tar, as that of busybox.
    """
    need_root("commit")
    from katapod.cli.interrupt import interruptible
    from katapod.images.committing import base_config, commit_image
    from katapod.model.image import parse_image_name
    from katapod.model.image_changes import apply_change
    from katapod.sandbox.client import connect_control
    from katapod.sandbox.execs import spec_on_disk

    parse_container_name(name)
    target = parse_image_name(image).text
    apply: dict[str, Any] = {}
    for text in flags["changes"]:
        apply_change(apply, text)  # before anything is read

    async def go() -> int:
        store = settings.states()
        async with connect_control(store, name) as client:
            record = client.record
        container = record.containers[0]
        images = settings.image_store()
        document = base_config(images, container.image_digest)
        config = document.setdefault("config", {})
        _take_over(config, container, spec_on_disk(store.layout.sandbox(name), name), record.labels)
        for text in flags["changes"]:
            apply_change(config, text)
        if flags["author"]:
            document["author"] = flags["author"]

        async def export(out: BinaryIO) -> None:
            await export_files(store, name, out)

        made = await commit_image(images, document, target, export, flags["message"] or f"commit of {name}")
        print(made.digest)
        return 0

    return interruptible(go())


def _take_over(
    config: dict[str, Any], container: "ContainerRecord", spec: "oci.Spec | None", labels: dict[str, str]
) -> None:
    """What the container was run with."""
    config.pop("Entrypoint", None)
    config["Cmd"] = list(container.command)
    if container.user:
        config["User"] = container.user
    if labels:
        config["Labels"] = {**(config.get("Labels") or {}), **labels}
    if spec is not None:
        config["Env"] = [entry for entry in spec.process.env if not entry.startswith(("HOSTNAME=", "TERM="))]
        config["WorkingDir"] = spec.process.cwd
