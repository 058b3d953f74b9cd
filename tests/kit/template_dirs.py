"""Directories of templates that belong to one test, looked at from outside: by their files and processes."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kit.templates import KATA

__all__ = ["TemplateDir", "template_dir"]


class TemplateDir:
    """`template_path` of a test."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def entries(self) -> set[str]:
        """Names in the directory, lock files left out."""
        if not self.root.exists():
            return set()
        return {name for name in os.listdir(self.root) if not name.endswith(".lock")}

    def keys(self) -> set[str]:
        return {name for name in self.entries() if not name.startswith(".")}

    def scratch(self) -> list[Path]:
        """What builders and removers have in hand, or have left."""
        return sorted(self.root / name for name in self.entries() if name.startswith("."))

    @property
    def folder(self) -> Path:
        """The folder of the only template."""
        (key,) = self.keys()
        return self.root / key

    def meta(self) -> dict[str, Any]:
        """meta.json of the only template."""
        found: dict[str, Any] = json.loads((self.folder / "meta.json").read_text())
        return found

    def change_meta(self, **changes: Any) -> None:
        (self.folder / "meta.json").write_text(json.dumps({**self.meta(), **changes}))

    def generation(self) -> int:
        """Tells the only template from one that takes its place."""
        return (self.folder / "memory").stat().st_ino

    def uses(self) -> int:
        return (self.folder / "uses").stat().st_size

    def builders(self) -> set[int]:
        """Processes of QEMU whose guest is to become a template in here; dead ones are not counted."""
        found = set()
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            with contextlib.suppress(OSError):
                if f"{self.root}/.".encode() in Path(f"/proc/{entry}/cmdline").read_bytes():
                    found.add(int(entry))
        return found

    def make(self) -> None:
        """Have a template of the built-in configuration made in here."""
        config = self.root.with_suffix(".toml")
        config.write_text(f'[factory]\ntemplate_path = "{self.root}"\n')
        try:
            subprocess.run([KATA, "--config", config, "factory", "init"], check=True, capture_output=True, timeout=180)
        finally:
            config.unlink()

    def copy_of(self, other: "TemplateDir") -> None:
        """Take over another one's templates, holes included; what was here goes."""
        shutil.rmtree(self.root, ignore_errors=True)
        subprocess.run(["cp", "-a", "--sparse=always", other.root, self.root], check=True)


@contextlib.contextmanager
def template_dir() -> Iterator[TemplateDir]:
    """A directory that goes with the block. Its path is short, since it becomes part of socket paths."""
    root = Path("/run") / f"kt-{os.getpid()}-{secrets.token_hex(3)}"
    try:
        yield TemplateDir(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)
