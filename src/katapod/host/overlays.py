"""Files that a sandbox's disks lie in."""

import os
from pathlib import Path

from katapod.model.errors import KatapodError, NoSpace
from katapod.plan.qcow2 import plan_empty_overlay

__all__ = ["make_overlay"]


def make_overlay(path: Path, *, base: Path, kept: bool = False) -> None:
    """Make `path`, an empty overlay over the disk `base`; with `kept` one that is there stays as it is.

    Nobody ever sees half of it. Raises NoSpace, KatapodError.
    """
    if kept and path.exists():
        return
    made = path.with_name(f".{path.name}")
    try:
        plan = plan_empty_overlay(base.stat().st_size)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(made, "wb") as file:
            file.truncate(plan.length_bytes)
            for offset, data in plan.pieces:
                file.seek(offset)
                file.write(data)
        os.replace(made, path)
    except OSError as exc:
        kind = NoSpace if exc.errno == 28 else KatapodError
        raise kind(f"cannot make the disk {path} over {base}: {exc.strerror}") from exc
