"""Templates on disk: found, opened, listed, removed.

ROOT/KEY/ holds `memory` (sparse), `state` (of the VM's devices), `meta.json` and `uses` (a byte for each clone). The
directory appears and goes by a rename, so nobody sees half a template. ROOT/KEY.lock is held by who builds KEY;
ROOT/.KEY.* is what a builder or remover has in hand, and litter once nobody holds the lock.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from katapod.model.errors import KatapodError
from katapod.model.tokens import random_hex
from katapod.vmm.template import FORMAT, KEY_LENGTH, TemplatePlan

__all__ = [
    "Template",
    "TemplateBroken",
    "TemplateHangs",
    "TemplateInfo",
    "TemplateLock",
    "TemplateMeta",
    "destroy_templates",
    "discard_template",
    "find_template",
    "list_templates",
    "put_in_place",
    "sweep_templates",
    "template_lock",
]


_OURS = re.compile(rf"\.?(?P<key>[0-9a-f]{{{KEY_LENGTH}}})(?:\..+)?")
"""What is ours in the directory: it may be any that a configuration names, with somebody's other files in it."""


class TemplateBroken(KatapodError):
    """A template cannot be made, or cannot be used. A cold boot does without one."""


class TemplateHangs(TemplateBroken):
    """Its guest did not boot in time."""


class TemplateMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """meta.json: what the other files have to be."""

    format: int
    key: str
    created_at: float  # seconds since the epoch
    memory_bytes: int  # size of `memory`, holes included
    data_bytes: int  # of it, what is no hole
    state_sha256: str
    description: str  # the machine's command line, for people


class TemplateInfo(Struct, frozen=True):
    """A template as people want to know of it."""

    key: str
    created_at: float
    last_used_at: float
    uses: int
    size_bytes: int  # on disk
    memory_mib: int  # of its guest


class Template(Struct, frozen=True):
    """One generation of a template, opened: it can be cloned even when another takes its place meanwhile."""

    key: str
    directory: Path
    memory_fd: int
    state_fd: int  # at its beginning
    uses_fd: int  # for appending
    memory_mib: int
    created_at: float

    @property
    def uses(self) -> int:
        return os.fstat(self.uses_fd).st_size

    def count_use(self) -> None:
        with contextlib.suppress(OSError):  # a full file system: the template itself is none the worse for it
            os.write(self.uses_fd, b".")

    def close(self) -> None:
        for fd in (self.memory_fd, self.state_fd, self.uses_fd):
            os.close(fd)

    def is_worn(self, plan: TemplatePlan) -> bool:
        """Whether the next use should be one of a new template."""
        return plan.limits.reached(time.time() - self.created_at, self.uses)


def find_template(plan: TemplatePlan) -> Template | None:
    """Open the template if there is one; the caller closes it.

    Raises TemplateBroken if its files are not what they should be. The device state is checked by its hash; of the
    memory only the size is, since to read all of it would take longer than a clone does.
    """
    try:
        directory = os.open(plan.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, directory)
        try:
            return _open_files(directory, plan)
        except FileNotFoundError as exc:
            if not plan.directory.exists():
                return None  # removed as we looked
            raise TemplateBroken(f"cannot use template {plan.directory}: it has no {exc.filename}") from exc
        except (OSError, msgspec.DecodeError) as exc:
            raise TemplateBroken(f"cannot use template {plan.directory}: {exc}") from exc


def _open_files(directory: int, plan: TemplatePlan) -> Template:
    """All through one descriptor of the directory, so that they are of one generation."""

    def open_file(name: str, flags: int = os.O_RDONLY) -> int:
        return os.open(name, flags | os.O_CLOEXEC, dir_fd=directory)

    with contextlib.ExitStack() as stack:
        meta_fd = open_file("meta.json")
        stack.callback(os.close, meta_fd)
        meta = msgspec.json.decode(_content(meta_fd), type=TemplateMeta)
        if (meta.format, meta.key) != (FORMAT, plan.key):
            raise TemplateBroken(f"cannot use template {plan.directory}: it is of another machine ({meta.key})")
        with contextlib.ExitStack() as kept:
            uses = open_file("uses", os.O_WRONLY | os.O_APPEND)
            kept.callback(os.close, uses)
            state = open_file("state")
            kept.callback(os.close, state)
            if hashlib.sha256(_content(state)).hexdigest() != meta.state_sha256:
                raise TemplateBroken(f"cannot use template {plan.directory}: its device state is damaged")
            memory = open_file("memory")
            kept.callback(os.close, memory)
            status = os.fstat(memory)
            if status.st_size != meta.memory_bytes or status.st_blocks * 512 < meta.data_bytes:
                raise TemplateBroken(f"cannot use template {plan.directory}: its memory file is cut short")
            kept.pop_all()
        return Template(plan.key, plan.directory, memory, state, uses, meta.memory_bytes >> 20, meta.created_at)


def _content(fd: int) -> bytes:
    """All of a file, without moving its offset."""
    return os.pread(fd, os.fstat(fd).st_size, 0)


class TemplateLock:
    """The right to build or to remove one key; it ends with the process that has it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = self._open()

    def _open(self) -> int:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise TemplateBroken(f"cannot keep templates in {self._path.parent}: {exc.strerror}") from exc

    def try_take(self) -> bool:
        """Raises TemplateBroken if the lock file is gone and cannot be made again."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._fd)):
                return True
        # who had the lock has removed its file since we opened it: what we hold keeps nobody out
        os.close(self._fd)
        self._fd = self._open()
        return self.try_take()

    def close(self) -> None:
        os.close(self._fd)


@contextlib.contextmanager
def template_lock(root: Path, key: str) -> Iterator[TemplateLock]:
    """Raises TemplateBroken if there can be no lock file."""
    lock = TemplateLock(root / f"{key}.lock")
    try:
        yield lock
    finally:
        lock.close()


def put_in_place(scratch: Path, plan: TemplatePlan) -> None:
    """Make a finished directory the template; the one before it goes. The caller holds the lock. Raises OSError."""
    _remove(plan.root, plan.key, plan.directory)
    os.rename(scratch, plan.directory)


def discard_template(template: Template) -> None:
    """Take away a template that made a clone fail, unless another has taken its place. Raises nothing."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(template.directory / "memory"), os.fstat(template.memory_fd)):
            _remove(template.directory.parent, template.key, template.directory)


def _remove(root: Path, key: str, path: Path) -> None:
    """Out of sight in one step, then off the disk. A path that is not there is fine. Raises OSError."""
    aside = root / f".{key}.{random_hex(4)}"
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside)


def _entries(root: Path) -> dict[str, list[os.DirEntry[str]]]:
    """What lies in `root` by key: templates and what is left of them; lock files count as a key without entries."""
    found: dict[str, list[os.DirEntry[str]]] = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(root):
            ours = _OURS.fullmatch(entry.name)
            if ours is None:
                continue
            entries = found.setdefault(ours["key"], [])
            if entry.is_dir(follow_symlinks=False):
                entries.append(entry)
    return found


def sweep_templates(plan: TemplatePlan) -> None:
    """Remove what killed builders left, templates that nobody has used for long, and of the others all but the few
    used last. The caller holds the lock of `plan`. Raises nothing: a sweep that fails is no reason not to build."""
    with contextlib.suppress(OSError, KatapodError):
        found = _entries(plan.root)
        others = [e for key, entries in found.items() if key != plan.key for e in entries if e.name == key]
        kept = {e.name for e in sorted(others, key=_unused_s)[: plan.limits.others_kept]}
        for key, entries in found.items():
            old = [e for e in entries if e.name not in kept or _unused_s(e) > plan.limits.unused_s]
            if key == plan.key:
                _remove_entries(plan.root, key, [e for e in old if e.name.startswith(".")])
                continue
            with template_lock(plan.root, key) as lock:
                if lock.try_take():
                    _remove_entries(plan.root, key, old)
                    if len(old) == len(entries):
                        (plan.root / f"{key}.lock").unlink(missing_ok=True)


def _remove_entries(root: Path, key: str, entries: list[os.DirEntry[str]]) -> None:
    for entry in entries:
        if entry.name.startswith("."):
            shutil.rmtree(entry.path)
        else:
            _remove(root, key, Path(entry.path))


def _unused_s(entry: os.DirEntry[str]) -> float:
    try:
        return time.time() - os.stat(f"{entry.path}/uses").st_mtime
    except OSError:
        return 0.0


def list_templates(root: Path) -> list[TemplateInfo]:
    """All templates below `root` that can be read, by key."""
    found = []
    for _, entries in sorted(_entries(root).items()):
        for entry in entries:
            if entry.name.startswith("."):
                continue
            with contextlib.suppress(OSError, msgspec.DecodeError):
                directory = Path(entry.path)
                meta = msgspec.json.decode((directory / "meta.json").read_bytes(), type=TemplateMeta)
                uses = (directory / "uses").stat()
                size = sum(file.stat().st_blocks * 512 for file in directory.iterdir())
                found.append(
                    TemplateInfo(meta.key, meta.created_at, uses.st_mtime, uses.st_size, size, meta.memory_bytes >> 20)
                )
    return found


def destroy_templates(root: Path) -> int:
    """Remove all templates below `root`; returns how many. Sandboxes that were cloned from them live on.

    One that is being built, or cannot be removed, does not stop the others from going. Raises KatapodError then.
    """
    count = 0
    kept: list[str] = []
    for key, entries in sorted(_entries(root).items()):
        try:
            with template_lock(root, key) as lock:
                if not lock.try_take():
                    kept.append(f"{key}: it is being built")
                    continue
                _remove_entries(root, key, entries)
                (root / f"{key}.lock").unlink(missing_ok=True)
        except OSError as exc:
            kept.append(f"{key}: {exc.strerror}")
        else:
            count += sum(not entry.name.startswith(".") for entry in entries)
    if kept:
        raise KatapodError(f"cannot remove template {'; '.join(kept)}", hint="try again in a moment", removed=count)
    return count
