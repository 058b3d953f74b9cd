"""Files that a sandbox's disks lie in."""

from pathlib import Path

from katapod.model.errors import KatapodError, NoSpace
from katapod.plan.qcow2 import plan_empty_overlay

__all__ = ["make_overlay"]


def make_overlay(path: Path, *, base: Path) -> None:
    """Make `path`, an empty overlay over the disk `base`. Raises NoSpace, KatapodError."""
    try:
        plan = plan_empty_overlay(base.stat().st_size)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(path, "xb") as file:
            file.truncate(plan.length_bytes)
            for offset, data in plan.pieces:
                file.seek(offset)
                file.write(data)
    except OSError as exc:
        kind = NoSpace if exc.errno == 28 else KatapodError
        raise kind(f"cannot make the disk {path} over {base}: {exc.strerror}") from exc
