"""The files of Debian packages that are installed on this node, and of their dependencies.

The image is made from what the node runs: nothing is downloaded. Dependencies are followed, except for the base of a
Debian system (priority required or important, essential), which the guest has in a smaller form or does without, and
for shared libraries, which come with the programs that need them. Source: dpkg-query(1), deb-control(5).
"""

import re
from collections.abc import Iterable, Sequence

from msgspec import Struct

from katapod.host.process import ProcessFailed, find_program, run
from katapod.model.recipe import RecipeError

__all__ = ["Package", "follow_dependencies", "package_files", "parse_packages"]

_FORMAT = (
    r"${db:Status-Abbrev}\t${Package}\t${Architecture}\t${Priority}\t${Essential}\t${Section}\t${Provides}\t"
    r"${Pre-Depends}, ${Depends}\n"
)
_BASE_PRIORITIES = frozenset({"required", "important"})
_LIBRARY_SECTIONS = frozenset({"libs", "oldlibs"})


class Package(Struct, frozen=True):
    """An installed package. `depends`: the alternatives of each dependency."""

    name: str
    architecture: str
    is_base: bool
    is_library: bool
    provides: tuple[str, ...]
    depends: tuple[tuple[str, ...], ...]


def parse_packages(text: str) -> dict[str, Package]:
    """Packages by name, except those not fully installed. Of several architectures the first listed one counts."""
    found: dict[str, Package] = {}
    for line in text.splitlines():
        fields = line.split("\t")
        if len(fields) != 8 or not fields[0].startswith("ii"):
            continue
        _, name, architecture, priority, essential, section, provides, depends = fields
        found.setdefault(
            name,
            Package(
                name,
                architecture,
                is_base=priority in _BASE_PRIORITIES or essential == "yes",
                is_library=section.rpartition("/")[2] in _LIBRARY_SECTIONS,
                provides=tuple(_name(item) for item in provides.split(",") if item.strip()),
                depends=tuple(
                    tuple(_name(choice) for choice in item.split("|")) for item in depends.split(",") if item.strip()
                ),
            ),
        )
    return found


def follow_dependencies(wanted: Iterable[str], installed: dict[str, Package]) -> list[str]:
    """`wanted` and their dependencies among `installed`, in order of discovery."""
    providers = {virtual: name for name, package in installed.items() for virtual in package.provides}
    pending, order = list(wanted), []
    while pending:
        name = pending.pop(0)
        if name in order:
            continue
        order.append(name)
        for choices in installed[name].depends:
            chosen = next((providers.get(choice, choice) for choice in choices if choice in installed), None)
            chosen = chosen or next((providers[choice] for choice in choices if choice in providers), None)
            if chosen is None:
                continue
            package = installed[chosen]
            if not package.is_base and not package.is_library:
                pending.append(chosen)
    return order


def _name(item: str) -> str:
    return re.sub(r"[\s(:].*", "", item.strip())


async def package_files(names: Sequence[str], recipe_name: str) -> list[str]:
    """The paths of `names` and their dependencies, directories included. Raises RecipeError, MissingProgram."""
    query = find_program("dpkg-query", package="dpkg")
    try:
        listed = await run([query, "-W", "-f", _FORMAT], timeout_s=60)
        installed = parse_packages(listed.stdout)
        missing = [name for name in names if name.partition(":")[0] not in installed]
        if missing:
            raise RecipeError(
                f"cannot use the image recipe {recipe_name}: packages: not installed on this node: "
                f"{', '.join(missing)}",
                hint=f"apt install {' '.join(missing)}: the image is made from packages of the node",
            )
        wanted = follow_dependencies([name.partition(":")[0] for name in names], installed)
        owned = await run([query, "-L", *(f"{name}:{installed[name].architecture}".removesuffix(":all")
                                          for name in wanted)], timeout_s=60)  # fmt: skip
    except ProcessFailed as exc:
        raise RecipeError(f"cannot use the image recipe {recipe_name}: packages: {exc}") from exc
    return sorted({line for line in owned.stdout.splitlines() if line.startswith("/")})
