"""The state directory: what exists, written before it is made, so that any later process can remove it."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec.structs import replace

from katapod.host.hints import hint_for
from katapod.model.devices import DeviceRecord, DeviceTable
from katapod.model.errors import AlreadyExists, InvalidState, KatapodError, NoSpace, NotFound
from katapod.model.json_text import decode_json, encode_json
from katapod.model.layout import Layout, SandboxPaths
from katapod.model.record import SandboxRecord, State

__all__ = ["StateStore", "supervisor_alive", "write_atomically"]

STAGING_S = 60.0  # a state directory is in the making for milliseconds; older ones were left behind
REMOVAL_LIMIT_S = 30.0


class StateStore:
    """The records below Layout.state_root."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def create(self, record: SandboxRecord) -> int:
        """Take the id: make its state directory, with the lock held and the first record in it.

        The directory is made under a name of its own and renamed, so nobody ever sees half of it. Returns
        the descriptor that holds the lock: it is free again when this process ends, however it ends, and
        so tells others whether the supervisor lives. Raises AlreadyExists, NoSpace.
        """
        paths = self.layout.sandbox(record.sandbox_id)
        staged = self._aside(record.sandbox_id)
        lock = -1
        try:
            self.layout.state_root.mkdir(mode=0o711, parents=True, exist_ok=True)
        except OSError as exc:
            raise _no_space(exc, self.layout.state_root) from exc
        try:
            staged.mkdir(mode=0o700)
            lock = os.open(staged / paths.lock.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_atomically(staged / paths.persist.name, _encode(record))
            os.rename(staged, paths.state)
        except BaseException as exc:
            if lock >= 0:
                os.close(lock)
            shutil.rmtree(staged, ignore_errors=True)
            if not isinstance(exc, OSError):
                raise
            if exc.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise AlreadyExists(
                    f"cannot create {record.sandbox_id}: the name is taken",
                    hint=f"choose another, or remove it: kata-runtime delete {record.sandbox_id}",
                ) from exc
            raise _no_space(exc, paths.state) from exc
        return lock

    def reclaim(self, record: SandboxRecord) -> int:
        """Take the id of a sandbox that is at rest: hold its lock, and have `record` in the place of its own. Returns
        the descriptor as create() does.

        Raises NotFound if it was removed meanwhile, AlreadyExists if somebody else holds it, InvalidState if its policy
        was to start it again (`restarts`) and somebody has asked for its end, NoSpace.
        """
        paths = self.layout.sandbox(record.sandbox_id)
        with self.removal(record.sandbox_id) as there:
            if not there or not paths.persist.exists():
                raise _not_there(record.sandbox_id)
            try:
                lock = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as exc:
                raise _no_space(exc, paths.lock) from exc
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if (record.restarts or record.restart_at) and self.read(record.sandbox_id).stop_asked:
                    raise InvalidState(f"cannot start {record.sandbox_id} again: somebody has stopped it")
                _drop_sockets(paths.state)
                self.write(record)
            except BlockingIOError as exc:
                os.close(lock)
                raise AlreadyExists(f"cannot start {record.sandbox_id}: another process has it") from exc
            except BaseException:
                os.close(lock)
                raise
        return lock

    def keep(self, record: SandboxRecord) -> None:
        """Have the record where a start of the host leaves it. Raises NoSpace, KatapodError."""
        write_atomically(self.layout.sandbox(record.sandbox_id).kept_record, _encode(record))

    def kept(self, sandbox_id: str) -> SandboxRecord | None:
        """What keep() has written; None if there is none that can be read."""
        try:
            return decode_json(self.layout.sandbox(sandbox_id).kept_record.read_bytes(), SandboxRecord)
        except (OSError, msgspec.DecodeError):
            return None

    def discard(self, sandbox_id: str) -> None:
        """Remove the state directory, in one step for all who look. Idempotent. Raises OSError."""
        aside = self._aside(sandbox_id)
        try:
            os.rename(self.layout.sandbox(sandbox_id).state, aside)
        except FileNotFoundError:
            return
        shutil.rmtree(aside)

    def _aside(self, sandbox_id: str) -> Path:
        """A name beside the state directories that is no id: ids do not begin with a dot."""
        return self.layout.state_root / f".{sandbox_id}.{os.urandom(4).hex()}"

    def sweep(self) -> None:
        """Remove what processes killed in create() or discard() left. Raises nothing."""
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.layout.state_root):
                path = Path(entry.path)
                if entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                    fresh = time.time() - entry.stat().st_mtime < STAGING_S
                    if not fresh and not _is_locked(path / self.layout.sandbox("x").lock.name):
                        shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def removal(self, sandbox_id: str, deadline: float | None = None) -> Iterator[bool]:
        """Be the only one who removes the sandbox or settles it while the block runs; waits for another who does,
        until time.monotonic() has passed `deadline` if that is given.

        Yields whether it is still there: False if it was removed meanwhile, even if the name is in use again.
        Raises KatapodError when the other does not get done.
        """
        state = self.layout.sandbox(sandbox_id).state
        try:
            fd = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            yield True  # perhaps stray directories
            return
        try:
            started = time.monotonic()
            limit = started + REMOVAL_LIMIT_S if deadline is None else deadline
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if (now := time.monotonic()) > limit:
                        raise KatapodError(
                            f"cannot remove {sandbox_id}: another process has been at it for {now - started:.0f} s"
                        ) from None
                    time.sleep(0.02)
            try:
                there = os.path.samestat(os.stat(state), os.fstat(fd))
            except FileNotFoundError:
                there = False
            yield there
        finally:
            os.close(fd)

    def write(self, record: SandboxRecord) -> None:
        """All but its devices, which have a file of their own (host/device_file.py)."""
        write_atomically(self.layout.sandbox(record.sandbox_id).persist, _encode(record))

    def drop_devices(self, sandbox_id: str) -> None:
        """The VM has ended. Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            self.layout.sandbox(sandbox_id).devices.unlink()

    def read(self, sandbox_id: str) -> SandboxRecord:
        """Raises NotFound; KatapodError if the record cannot be read."""
        path = self.layout.sandbox(sandbox_id).persist
        try:
            return self._with_devices(decode_json(path.read_bytes(), SandboxRecord))
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise _not_there(sandbox_id) from exc
        except msgspec.DecodeError as exc:
            raise KatapodError(
                f"cannot read {path}: {exc}", hint=f"kata-runtime delete --force {sandbox_id} removes it"
            ) from exc

    def _with_devices(self, record: SandboxRecord) -> SandboxRecord:
        """Without them if that file cannot be read: a sandbox can be listed and removed all the same."""
        try:
            found = decode_json(self.layout.sandbox(record.sandbox_id).devices.read_bytes(), DeviceRecord)
        except (OSError, msgspec.DecodeError):
            return record
        if record.state is State.CREATING:  # what is entered is still to be plugged
            return replace(record, devices=found.table)
        return replace(record, devices=found.table, mem_mib=found.memory.mib + found.table.plugged_mib)

    def ids(self) -> list[str]:
        """All ids that have a state directory, readable or not."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            entries = list(os.scandir(self.layout.state_root))
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
        return []

    def stray_ids(self, booted_at: float) -> list[str]:
        """Ids that have data, but no state directory: a restart of the host leaves them, since /run is emptied.

        Only what is older than this boot counts: another mount namespace may have a /run of its own, with
        live sandboxes whose data we see.
        """
        found: set[str] = set()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for entry in os.scandir(self.layout.data_root):
                if entry.name.startswith("."):
                    continue  # set aside already
                if entry.is_dir(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_ctime < booted_at:
                    found.add(entry.name)
        return sorted(found.difference(self.ids()))

    def has_kept_strays(self) -> bool:
        """Whether there may be containers that a start of the host has left without their records in /run."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            names = {entry.name for entry in os.scandir(self.layout.data_root)} - set(self.ids())
            return any(self.layout.sandbox(name).kept_record.exists() for name in names if not name.startswith("."))
        return False

    def records(self) -> Iterator[SandboxRecord]:
        """All readable records; those that vanish or cannot be read are passed over."""
        for sandbox_id in self.ids():
            with contextlib.suppress(KatapodError):
                yield self.read(sandbox_id)


def supervisor_alive(paths: SandboxPaths) -> bool:
    """Whether the process that owns the sandbox lives: it holds the lock as long as it does."""
    return _is_locked(paths.lock)


def _is_locked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not take each other for the supervisor
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _drop_sockets(directory: Path) -> None:
    """Those of a supervisor that was killed; a name that is taken cannot be bound."""
    for entry in os.scandir(directory):
        if stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode):
            os.unlink(entry.path)


def _encode(record: SandboxRecord) -> bytes:
    return encode_json(replace(record, devices=DeviceTable()), indent=1)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file in one step. Raises NoSpace or KatapodError; the former content stays then."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise _no_space(exc, path) from exc


def _not_there(sandbox_id: str) -> NotFound:
    return NotFound(f"cannot find {sandbox_id}: no such container", hint="see: kata-runtime list")


def _no_space(exc: OSError, path: Path) -> KatapodError:
    kind = NoSpace if exc.errno in (28, 122) else KatapodError  # ENOSPC, EDQUOT
    return kind(f"cannot write {path}: {exc.strerror}", hint=hint_for(exc))
