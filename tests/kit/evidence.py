"""What is kept of a failed test: what it ran, and logs and records of its containers that still exist."""

import contextlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from kit.containerd import Containerd
from kit.kata import RUN_PREFIX, Kata

__all__ = ["save_evidence"]

STATE_ROOT = Path("/run/vc/sbs")
DATA_ROOT = Path("/var/lib/katapod/sandboxes")
KEPT_MAX_BYTES = 4 << 20
FAILURES = Path(__file__).resolve().parents[2] / "build" / "test-failures"


def save_evidence(test: str, katas: Sequence[Kata], nodes: Sequence[Containerd] = ()) -> Path:
    """Write transcript, console, logs and records below build/test-failures/TEST; returns that folder."""
    folder = FAILURES / re.sub(r"[^a-zA-Z0-9_.-]+", "-", test)[:120]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "transcript.txt").write_text(
        "\n".join([*(kata.transcript for kata in katas), *(node.transcript for node in nodes)]),
        errors="surrogateescape",  # of file names
    )
    for node in nodes:
        if node.log.exists():
            shutil.copyfile(node.log, folder / f"{node.name}.log")
    for root in (STATE_ROOT, DATA_ROOT):
        for sandbox in root.glob(f"{RUN_PREFIX}*"):
            target = folder / sandbox.name
            target.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # it may go meanwhile
                for file in sandbox.iterdir():  # logs, records and specs; not the container's own files
                    if file.is_file() and not file.is_symlink() and file.stat().st_size <= KEPT_MAX_BYTES:
                        shutil.copyfile(file, target / file.name)
    return folder
