"""`cp`, `export`: files of a running container, by a tar that runs in it."""

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import click

from katapod.cli.command import HOST_PATH, argument, flag, option, verb
from katapod.cli.outputs import opened_output
from katapod.cli.settings import Globals, need_root
from katapod.model.errors import KatapodError, NotFound, UsageError
from katapod.model.ids import parse_container_name

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from katapod.host.state import StateStore

__all__ = ["copy", "export", "export_files", "mounted_in", "read_files"]

NO_PROGRAM = (126, 127)
READ_SIZE = 1 << 20
NAMES_MAX = 1 << 20  # bytes


class Place(NamedTuple):
    """`container` is empty for the host, where "-" is a stream in tar's format."""

    container: str
    path: str


def parse_place(text: str) -> Place:
    """NAME:PATH, or a path of this host: one that has a colon begins with / or a dot. Raises UsageError."""
    name, colon, path = text.partition(":")
    if not colon or text.startswith(("/", ".")) or text == "-":
        return Place("", text)
    if not path:
        raise UsageError(f"cannot copy {text}: it names no path in the container", hint="for example: web:/etc/hosts")
    return Place(parse_container_name(name), path)


@verb("cp")
@flag("-a", "--archive", help="Keep owners; they are kept anyway.")
@flag("-q", "--quiet", help="Say nothing, as is the case.")
@flag("-L", "--follow-link", help="Copy what a symbolic link at SRC points to.")
@argument("source", metavar="SRC", type=HOST_PATH, help="NAME:PATH, a path of this host, or - for a tar on stdin.")
@argument("target", metavar="DST", type=HOST_PATH, help="NAME:PATH, a path of this host, or - for a tar on stdout.")
@click.pass_obj
def copy(settings: Globals, archive: bool, quiet: bool, follow_link: bool, source: str, target: str) -> int:
    """Copy files between a running container and this host.

    The container needs a tar, as that of busybox. A SRC that ends in /. means what is in the directory.
    """
    need_root("cp")
    here, there = parse_place(source), parse_place(target)
    if bool(here.container) == bool(there.container):
        raise UsageError(
            "cannot copy: one of SRC and DST has to be in a container", hint="for example: web:/etc/hosts ."
        )
    store = settings.states()
    if here.container:
        return asyncio.run(_out(store, here, there.path, follow_link=follow_link))
    return asyncio.run(_into(store, here.path, there, follow_link=follow_link))


@verb("export")
@argument("name", metavar="NAME", help="Name of a running container.")
@option("-o", "--output", metavar="FILE", type=HOST_PATH, help="Write to FILE; default: standard output.")
@click.pass_obj
def export(settings: Globals, name: str, output: str) -> int:
    """Write the files of a running container as a tar; what is mounted in it is left out."""
    need_root("export")
    parse_container_name(name)
    if not output and os.isatty(1):
        raise UsageError("cannot write a tar to a terminal", hint=f"kata-runtime export {name} -o FILE")
    with opened_output(output) as handle:
        asyncio.run(export_files(settings.states(), name, handle))
    return 0


async def export_files(store: "StateStore", name: str, out: BinaryIO) -> None:
    """What is mounted below the top is left out of what comes: the tar of busybox cannot be told. Raises
    KatapodError."""
    from katapod.host.untar import copy_without

    mounts = mounted_in(store, name)
    await read_files(store, name, mounts, lambda stream: copy_without(stream, out, mounts))


def mounted_in(store: "StateStore", name: str) -> set[str]:
    """Paths in a container where something is mounted, without a slash at either end. Raises KatapodError."""
    from katapod.sandbox.execs import spec_on_disk

    spec = spec_on_disk(store.layout.sandbox(name), name)
    return {mount.destination.strip("/") for mount in spec.mounts} if spec else set()


async def read_files(store: "StateStore", name: str, mounts: set[str], take: "Callable[[BinaryIO], object]") -> None:
    """Have `take` read a tar of a container's files. What is mounted at the top, such as /proc, is not even read: some
    of it has no end. `mounts`: as of mounted_in(). Raises KatapodError."""
    with open(os.devnull, "wb") as null, os.fdopen(os.memfd_create("names"), "r+b") as names:
        status = await _exec(store, name, ("ls", "-A", "/"), None, names.fileno(), null.fileno())
        names.seek(0)
        top = sorted(set(names.read(NAMES_MAX).decode(errors="surrogateescape").splitlines()) - mounts)
    if status:
        raise KatapodError(f"cannot list the files of container {name}: it has no ls")
    command = ("tar", "-c", "-f", "-", "-C", "/", "--", *top)
    await _received(store, name, command, take)


async def _out(store: "StateStore", source: Place, target: str, *, follow_link: bool) -> int:
    """As cp(1): into a directory that is there, else under the target's name."""
    from katapod.host.untar import unpack

    path = "/" + source.path.strip("/").removesuffix("/.")
    content = source.path.endswith("/.") or path == "/"
    directory, name = (path, ".") if content else os.path.split(path)
    command = ("tar", "-c", *(("-h",) if follow_link else ()), "-f", "-", "-C", directory, "--", name)
    if target == "-":
        await _tar(store, source.container, command, None, 1)
        return 0
    place, rename = Path(target), ""
    if content:
        place.mkdir(exist_ok=True)
    elif not place.is_dir():
        if target.endswith("/") or not place.parent.is_dir():
            raise NotFound(f"cannot copy to {target}: no such directory")
        place, rename = place.parent, place.name
    await _received(store, source.container, command, lambda stream: unpack(stream, place, name, rename))
    return 0


async def _received(
    store: "StateStore", name: str, command: tuple[str, ...], take: "Callable[[BinaryIO], object]"
) -> None:
    """Run a tar in the container, of which `take` gets what it writes, in a thread. Raises KatapodError."""
    from katapod.tasks import together

    reader, writer = os.pipe()

    async def send() -> None:
        try:
            await _tar(store, name, command, None, writer)
        finally:
            os.close(writer)

    def receive() -> None:
        with os.fdopen(reader, "rb") as stream:
            try:
                take(stream)
            finally:
                while stream.read(READ_SIZE):  # until the other side has ended: its error is the cause
                    pass

    sending, receiving = await together(_failure(send()), _failure(asyncio.to_thread(receive)))
    if (failed := sending or receiving) is not None:
        raise failed


async def _failure(work: "Coroutine[Any, Any, None]") -> KatapodError | None:
    try:
        await work
    except KatapodError as exc:
        return exc
    return None


async def _into(store: "StateStore", source: str, target: Place, *, follow_link: bool) -> int:
    from katapod.host.untar import pack
    from katapod.tasks import together

    into = target.path
    if source == "-":
        await _tar(store, target.container, ("tar", "-x", "-f", "-", "-C", into), 0, -1)
        return 0
    if not os.path.lexists(source):
        raise NotFound(f"cannot copy {source}: no such file or directory")
    name = "." if source.endswith("/.") else os.path.basename(os.path.abspath(source))
    if name != "." and not await _is_directory(store, target):
        if into.endswith("/"):
            raise NotFound(f"cannot copy to {target.container}:{into}: no such directory")
        into, name = os.path.split(into)
    reader, writer = os.pipe()

    def send() -> None:
        with os.fdopen(writer, "wb") as stream:
            pack(Path(source), name, stream, follow_links=follow_link)

    async def receive() -> None:
        try:
            await _tar(store, target.container, ("tar", "-x", "-f", "-", "-C", into or "/"), reader, -1)
        finally:
            os.close(reader)

    sending, receiving = await together(_failure(asyncio.to_thread(send)), _failure(receive()))
    if (failed := sending or receiving) is not None:
        raise failed
    return 0


async def _is_directory(store: "StateStore", place: Place) -> bool:
    with open(os.devnull, "wb") as null:
        return await _exec(store, place.container, ("test", "-d", place.path), None, null.fileno(), null.fileno()) == 0


async def _tar(store: "StateStore", name: str, command: tuple[str, ...], stdin: int | None, stdout: int) -> None:
    """Run it in the container, as root. Raises KatapodError with what it says."""
    with open(os.devnull, "wb") as null, os.fdopen(os.memfd_create("tar"), "r+b") as said:
        status = await _exec(store, name, command, stdin, null.fileno() if stdout < 0 else stdout, said.fileno())
        said.seek(0)
        text = said.read(2000).decode(errors="replace").strip()
    if status in NO_PROGRAM:
        raise KatapodError(f"cannot copy: container {name} has no tar", hint="mount a directory: run -v DIR:DST")
    if status:
        raise KatapodError(f"cannot copy: tar in container {name}: {text or f'exit status {status}'}")


async def _exec(
    store: "StateStore", name: str, command: tuple[str, ...], stdin: int | None, stdout: int, stderr: int
) -> int:
    from katapod.model.flags import UserName
    from katapod.sandbox.errors import CommandNotExecutable, CommandNotFound
    from katapod.sandbox.execs import ExecRequest
    from katapod.supervisor.exec_run import started_exec
    from katapod.supervisor.foreground import carry_to

    request = ExecRequest(command, user=UserName(user="0", group="0"))
    try:
        async with started_exec(store, name, name, name, request) as running:
            streams = (0 if stdin is None else stdin, stdout, stderr)
            return await carry_to(running, streams, interactive=stdin is not None)
    except CommandNotFound:
        return NO_PROGRAM[1]
    except CommandNotExecutable:
        return NO_PROGRAM[0]
