"""The recipe of a guest image: one TOML file that says what is added to it. Pure: text in, frozen value out.

    packages = ["strace"]                 # Debian packages that are installed on this node
    kernel_modules = ["xfs"]              # in the image, for modprobe
    load_kernel_modules = ["dummy"]       # loaded when the guest boots
    hook = "finish.sh"                    # run over the finished tree on this node

    [[files]]
    source = "motd"                       # file or directory; relative to the recipe
    target = "/etc/motd"
    mode = "0644"                         # default: the source's

docs/how-to/guest-image.md teaches it.
"""

import re
import tomllib
from pathlib import Path, PurePosixPath

import msgspec

from katapod.model.errors import ConfigError

__all__ = ["DEFAULT_RECIPE", "EMPTY_RECIPE", "Recipe", "RecipeError", "RecipeFile", "guest_path", "parse_recipe"]

DEFAULT_RECIPE = Path("/etc/kata-containers/image.toml")
"""Used if it is there and no other is named."""

RECIPE_MAX = 1024 * 1024  # bytes

_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9-]+)?")
_MODULE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_MODE = re.compile(r"0?[0-7]{3,4}")
_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_OURS = ("/init", "/usr/bin/kata-agent", "/usr/bin/crun", "/usr/bin/busybox", "/usr/lib/katapod", "/etc/katapod")
_KEYS = ("packages", "kernel_modules", "load_kernel_modules", "hook", "files")


class RecipeError(ConfigError):
    """A recipe that cannot be used; the text names the file, the key and what to do."""


class RecipeFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    source: str
    """File or directory of this node; parse_recipe makes it absolute."""
    target: str
    """Where it goes in the guest, absolute."""
    mode: str = ""
    """Octal digits; of a directory: of each file in it. Default: as the source."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    packages: tuple[str, ...] = ()
    kernel_modules: tuple[str, ...] = ()
    load_kernel_modules: tuple[str, ...] = ()
    hook: str = ""
    files: tuple[RecipeFile, ...] = ()


EMPTY_RECIPE = Recipe()


def guest_path(path: str) -> str:
    """The same path in a guest, whose /usr is merged: /bin/x is /usr/bin/x."""
    parts = PurePosixPath(path).parts
    return str(PurePosixPath("/usr", *parts[1:])) if len(parts) > 1 and parts[1] in _MERGED else path


def parse_recipe(content: bytes, where: Path) -> Recipe:
    """Parse the file `where`; relative sources are beside it. Raises RecipeError."""

    def error(problem: str, hint: str = "correct the file and try again") -> RecipeError:
        return RecipeError(f"cannot use the image recipe {where}: {problem}", hint=hint)

    if len(content) > RECIPE_MAX:
        raise error(f"it is larger than {RECIPE_MAX >> 20} MiB")
    try:
        raw = tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise error(f"not TOML: {exc}") from exc
    for key in raw:
        if key not in _KEYS:
            import difflib

            close = difflib.get_close_matches(key, _KEYS, n=1)
            raise error(f"unknown key {key}" + (f"; did you mean {close[0]}?" if close else f"; known: {_listed()}"))
    try:
        recipe = msgspec.convert(raw, Recipe)
    except msgspec.ValidationError as exc:
        raise error(str(exc).replace("`$.", "`").replace("[...]", "")) from exc
    for name in recipe.packages:
        if not _PACKAGE.fullmatch(name):
            raise error(f"packages: {name!r} is not a Debian package name")
    for key, names in (
        ("kernel_modules", recipe.kernel_modules),
        ("load_kernel_modules", recipe.load_kernel_modules),
    ):
        for name in names:
            if not _MODULE.fullmatch(name):
                raise error(f"{key}: {name!r} is not a kernel module name")
    files = []
    for number, file in enumerate(recipe.files, 1):
        problem = _judge_file(file)
        if problem:
            raise error(f"files, entry {number}: {problem}")
        target = guest_path(str(PurePosixPath(file.target)))
        files.append(RecipeFile(str(where.parent / file.source), target, file.mode))
    return Recipe(
        packages=tuple(dict.fromkeys(recipe.packages)),
        kernel_modules=_modules(recipe.kernel_modules),
        load_kernel_modules=_modules(recipe.load_kernel_modules),
        hook=str(where.parent / recipe.hook) if recipe.hook else "",
        files=tuple(files),
    )


def _listed() -> str:
    return ", ".join(_KEYS)


def _modules(names: tuple[str, ...]) -> tuple[str, ...]:
    """As lsmod shows them."""
    return tuple(dict.fromkeys(name.replace("-", "_") for name in names))


def _judge_file(file: RecipeFile) -> str:
    path = PurePosixPath(file.target)
    if not file.source:
        return "source is empty"
    if not path.is_absolute() or ".." in path.parts or len(path.parts) < 2:
        return f"target {file.target!r} is not an absolute path below / without '..'"
    target = PurePosixPath(guest_path(str(path)))
    for ours in _OURS:
        if target.is_relative_to(ours):
            return f"target {file.target!r} belongs to the guest's own parts ({ours})"
    if file.mode and not _MODE.fullmatch(file.mode):
        return f'mode {file.mode!r} is not octal, as "0644" is'
    return ""
