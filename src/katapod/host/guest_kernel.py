"""What a guest kernel that is a program needs of this node: the libraries that it is linked to.

A jail's empty root must have them. They stand in the manifest beside the program, where the image builder has put it;
of a program of somebody else's ldd(1) tells.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from katapod.host.process import find_program, run

__all__ = ["kernel_libraries", "library_names"]

MANIFEST_MAX = 1024 * 1024  # bytes


async def kernel_libraries(kernel: Path) -> tuple[Path, ...]:
    """Absolute paths under which `kernel` looks for its libraries, its dynamic linker among them.

    Raises MissingProgram if ldd(1) is needed and not there.
    """
    real = kernel.resolve()
    try:
        with (real.parent / "manifest.json").open("rb") as handle:
            manifest = json.loads(handle.read(MANIFEST_MAX))
        if manifest["kernel"] == real.name and manifest["libraries"]:
            return tuple(Path(path) for path in manifest["libraries"])
    except (OSError, ValueError, LookupError, TypeError):
        pass  # not an image of ours
    return tuple(Path(path) for path in await library_names([real]))


async def library_names(binaries: Iterable[Path]) -> tuple[str, ...]:
    """What ldd(1) resolves for programs, by the paths under which they find it, their dynamic linker included."""
    done = await run(
        [find_program("ldd", package="libc-bin"), *map(str, binaries)],
        timeout_s=120,
        check=False,  # it fails for static programs, which need none
    )
    paths = re.findall(r"(?:=> |^\s+)(/\S+)", done.stdout, re.MULTILINE)
    return tuple(sorted(set(paths)))
