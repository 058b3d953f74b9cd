"""The program of `run --init`: a static one of the host's, which reaps what is orphaned and passes signals on.

Source: tini's README, docker-run(1), podman-run(1).
"""

import os
import struct
from pathlib import Path

from katapod.model.errors import MissingProgram

__all__ = ["find_init_program"]

PROGRAMS = (
    "/usr/bin/tini-static",
    "/usr/bin/docker-init",
    "/usr/libexec/docker/docker-init",
    "/usr/bin/catatonit",
    "/usr/libexec/podman/catatonit",
    "/usr/libexec/catatonit/catatonit",
)
PT_INTERP = 3
ELF64_HEADER, ELF64_PROGRAM_HEADER = 64, 56


def find_init_program(programs: tuple[str, ...] = PROGRAMS) -> str:
    """The first that is there and needs no library of the image. Raises MissingProgram."""
    for path in programs:
        if os.access(path, os.X_OK) and _is_static(Path(path)):
            return path
    raise MissingProgram(
        "cannot use --init: this host has no static init program",
        hint="install the package tini: apt-get install tini",
    )


def _is_static(path: Path) -> bool:
    """Whether an ELF program of 64 bits names no interpreter. Source: elf(5)."""
    try:
        with path.open("rb") as handle:
            head = handle.read(ELF64_HEADER)
            if len(head) < ELF64_HEADER or head[:5] != b"\x7fELF\x02":
                return False
            offset, size, count = *struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54)
            if size != ELF64_PROGRAM_HEADER or count > 128:
                return False
            handle.seek(offset)
            table = handle.read(size * count)
    except OSError:
        return False
    return all(struct.unpack_from("<I", table, place)[0] != PT_INTERP for place in range(0, len(table), size))
