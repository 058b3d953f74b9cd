"""Directories of templates that belong to one test, looked at from outside: by their files and processes."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from katapod.host.facts import collect_host_facts
from katapod.model.config import load_config
from katapod.sandbox.planning import default_template
from katapod.sandbox.template_store import template_lock
from katapod.vmm.template import TemplatePlan
from kit.accel import QEMU_ACCELERATOR, REMEDY
from kit.kata import wait_for
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

    def copy_of_the_usual(self) -> None:
        """Take over the template of the built-in configuration, made if need be, without the uses that it has had."""
        self.root.mkdir(mode=0o700)
        config = self.root.with_suffix(".toml")
        config.touch()
        try:
            plan = default_template(load_config(config).config, collect_host_facts(), QEMU_ACCELERATOR, REMEDY)
            assert plan is not None, "there is no guest image"
            while not self._copy(plan):  # removed in between
                init = [KATA, "--config", str(config), "factory", "init", "--accel", QEMU_ACCELERATOR.value]
                subprocess.run(init, check=True, capture_output=True, timeout=180)
        finally:
            config.unlink()
        (self.folder / "uses").write_bytes(b"")
        os.utime(self.folder / "uses")
        self.change_meta(created_at=time.time())

    def _copy(self, plan: TemplatePlan) -> bool:
        """Whether there was one. Nobody changes it meanwhile."""
        with template_lock(plan.root, plan.key) as lock:
            wait_for(lock.try_take, f"the lock of template {plan.key}")
            if there := plan.directory.exists():
                subprocess.run(["cp", "-a", "--sparse=always", plan.directory, self.root], check=True)
        return there

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
