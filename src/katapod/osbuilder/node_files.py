"""Files of this node for the guest: systemd, those of a recipe, and of the packages that it names."""

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from katapod.model.errors import MissingProgram
from katapod.model.flavour import Flavour
from katapod.model.recipe import Recipe, RecipeError, guest_path
from katapod.osbuilder.errors import OsbuilderError
from katapod.osbuilder.packages import package_files
from katapod.osbuilder.shared_libraries import loaded_later
from katapod.plan.guest_image import FileKind, GuestExtras, GuestFile
from katapod.plan.guest_systemd import SYSTEMD_FILES

__all__ = ["collect_extras", "sources_of"]

_UNWANTED = (
    "/usr/share/bug", "/usr/share/doc", "/usr/share/doc-base", "/usr/share/help", "/usr/share/info",
    "/usr/share/lintian", "/usr/share/locale", "/usr/share/man", "/usr/share/bash-completion", "/usr/share/zsh",
    "/usr/share/fish", "/usr/share/applications", "/usr/share/icons", "/usr/share/pixmaps",
)  # fmt: skip


async def collect_extras(flavour: Flavour, recipe: Recipe, recipe_name: str) -> GuestExtras:
    """The files that `flavour` and `recipe` add. Raises RecipeError, MissingProgram, OsbuilderError."""
    files: list[GuestFile] = []
    if flavour == "systemd":
        files += _systemd_files()
    if recipe.packages:
        paths = await package_files(recipe.packages, recipe_name)
        files += _no_shadow(_describe_all(Path(path), guest_path(path)) for path in paths if _wanted(path))
    for entry in recipe.files:
        source = Path(entry.source)
        if not source.exists():
            raise RecipeError(
                f"cannot use the image recipe {recipe_name}: files: {source} does not exist",
                hint="sources are relative to the directory of the recipe",
            )
        mode = int(entry.mode, 8) if entry.mode else None
        if source.is_dir():
            files += _tree(source, entry.target, mode)
        else:
            files.append(_describe(source.resolve(), entry.target, mode))
    later = await loaded_later(Path(file.source) for file in files if file.kind is FileKind.PROGRAM)
    for path in later:
        files += _with_link(str(path), guest_path(str(path)))
    if recipe.hook and not os.access(recipe.hook, os.X_OK):
        problem = "is not executable" if os.path.exists(recipe.hook) else "does not exist"
        raise RecipeError(
            f"cannot use the image recipe {recipe_name}: hook: {recipe.hook} {problem}",
            hint="a hook is a program or a script with its #! line, executable",
        )
    return GuestExtras(
        flavour=flavour,
        files=tuple(files),
        load_modules=recipe.load_kernel_modules,
        more_modules=recipe.kernel_modules,
        hook=os.path.realpath(recipe.hook) if recipe.hook else "",
    )


def sources_of(extras: GuestExtras) -> tuple[Path, ...]:
    """The files on whose content the image depends."""
    sources = [Path(file.source) for file in extras.files if file.kind in (FileKind.PROGRAM, FileKind.DATA)]
    return (*sources, *((Path(extras.hook),) if extras.hook else ()))


def _systemd_files() -> Iterator[GuestFile]:
    for wanted in SYSTEMD_FILES:
        # Without a merged /usr, files of the guest's /usr/lib may be in /lib.
        found = next((path for path in (wanted.path, wanted.path.removeprefix("/usr")) if os.path.exists(path)), None)
        if found is not None:
            yield from _with_link(found, wanted.path)
        elif wanted.required:
            raise MissingProgram(
                f"cannot build the systemd guest: this node has no {wanted.path}",
                hint="apt install systemd udev, or build the default flavour",
            )


def _with_link(source: str, target: str) -> Iterator[GuestFile]:
    """A file; if it is a link within its directory or to a file of another wanted path, the file it leads to."""
    if os.path.islink(source):
        real = os.path.realpath(source)
        place = guest_path(real)
        if place != target:
            yield GuestFile(target, FileKind.LINK, os.path.relpath(place, os.path.dirname(target)))
            yield _describe(Path(real), place, None)
            return
    yield _describe(Path(source), target, None)


def _wanted(path: str) -> bool:
    if path == "/." or "\n" in path:
        return False
    return not any(path == directory or path.startswith(f"{directory}/") for directory in _UNWANTED)


def _describe_all(source: Path, target: str) -> GuestFile | None:
    """A path of a package; None if the node no longer has it, or it is not a regular file, directory or link."""
    try:
        status = source.lstat()
    except OSError:
        return None
    if stat.S_ISLNK(status.st_mode):
        return GuestFile(target, FileKind.LINK, _link_in_guest(os.readlink(source)))
    if stat.S_ISDIR(status.st_mode):
        return GuestFile(target, FileKind.DIRECTORY, "", stat.S_IMODE(status.st_mode))
    return _describe(source, target, None) if stat.S_ISREG(status.st_mode) else None


def _link_in_guest(target: str) -> str:
    return guest_path(target) if target.startswith("/") else target


def _no_shadow(files: Iterable[GuestFile | None]) -> list[GuestFile]:
    """Omit directories that are links in the guest, such as /lib with a merged /usr."""
    kept = [file for file in files if file is not None]
    return [file for file in kept if not (file.kind is FileKind.DIRECTORY and file.target in ("/", "/usr"))]


def _tree(source: Path, target: str, mode: int | None) -> Iterator[GuestFile]:
    yield GuestFile(target, FileKind.DIRECTORY, "", stat.S_IMODE(source.stat().st_mode))
    for path in sorted(source.rglob("*")):
        place = f"{target}/{path.relative_to(source)}"
        if path.is_symlink():
            yield GuestFile(place, FileKind.LINK, os.readlink(path))
        elif path.is_dir():
            yield GuestFile(place, FileKind.DIRECTORY, "", stat.S_IMODE(path.stat().st_mode))
        elif path.is_file():
            yield _describe(path, place, mode)
        else:
            raise OsbuilderError(f"cannot put {path} into the guest image: it is not a file, directory or link")


def _describe(source: Path, target: str, mode: int | None) -> GuestFile:
    try:
        with source.open("rb") as handle:
            head = handle.read(18)
            real_mode = stat.S_IMODE(os.fstat(handle.fileno()).st_mode)
    except OSError as exc:
        raise OsbuilderError(f"cannot read {source} for the guest image: {exc.strerror}") from exc
    # executables and shared objects: a relocatable one (a kernel module, e_type 1) is data
    is_program = head[:4] == b"\x7fELF" and head[16:18] in (b"\x02\x00", b"\x03\x00") and mode is None
    return GuestFile(target, FileKind.PROGRAM if is_program else FileKind.DATA, str(source), mode or real_mode)
