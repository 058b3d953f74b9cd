"""What is on disk about the containers of one --root: a directory each, written before anything else is made.

    ROOT/ID/state.json     the container; its supervisor writes it, every command reads it
    ROOT/.SANDBOX/         of a supervisor, which may hold several containers: lock, socket, log

The lock is free when the supervisor has ended, however that was: then the container has, too. Imports little.
"""

from __future__ import annotations

import json
import os
import re

from katapod.oci.errors import OciError, does_not_exist, exists

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Record", "State", "Store", "SupervisorDir"]

STATE = "state.json"
_ID = re.compile(r"[a-zA-Z0-9_+][a-zA-Z0-9_+.-]*")
_HEX_ID = re.compile(r"[0-9a-f]{64}")
ID_MAX = 1024
NAME_MAX = 64
if TYPE_CHECKING:
    State = dict[str, Any]
else:
    State = dict
"""id, bundle, rootfs, created, owner, annotations, status and pid as OCI has them; `sandbox`: its VM, whose supervisor
has the directory of that name; `netns`: DEVICE:INODE of the network namespace; `cgroups`: directories made for it."""


class SupervisorDir:
    """ROOT/.SANDBOX: of the process that holds a VM."""

    def __init__(self, root: str, sandbox_id: str) -> None:
        self.path = os.path.join(root, f".{sandbox_id}")
        self.lock = os.path.join(self.path, "lock")
        self.log = os.path.join(self.path, "log")
        self.socket_name = "oci.sock"

    def alive(self) -> bool:
        import fcntl

        try:
            fd = os.open(self.lock, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not take each other for it
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def remove(self) -> None:
        _remove(self.path)


class Record:
    """One container's directory."""

    def __init__(self, root: str, container_id: str) -> None:
        self.root = root
        self.id = container_id
        self.path = os.path.join(root, container_id)

    def claim(self, state: State) -> None:
        """Take the id. Raises OciError if it is taken, or the directory cannot be made."""
        try:
            os.makedirs(self.root, mode=0o700, exist_ok=True)
            os.mkdir(self.path, 0o711)
        except FileExistsError:
            raise exists(self.id) from None
        except OSError as exc:
            raise OciError(f"cannot create {self.path}: {os.strerror(exc.errno or 0)}") from exc
        self.write(state)

    def write(self, state: State) -> None:
        """Raises OciError."""
        temporary = os.path.join(self.path, f".{STATE}.{os.getpid()}")
        try:
            with open(temporary, "w") as handle:
                json.dump(state, handle)
            os.rename(temporary, os.path.join(self.path, STATE))
        except OSError as exc:
            raise OciError(f"cannot write {self.path}/{STATE}: {os.strerror(exc.errno or 0)}") from exc

    def read(self) -> State:
        """What was last written, but that a container whose supervisor has ended is stopped. Raises OciError."""
        if not os.path.isdir(self.path):
            raise does_not_exist(self.id)
        state = self.read_as_is()
        if state["status"] != "stopped" and not self.supervisor(state).alive():
            state["status"], state["pid"] = "stopped", 0
        return state

    def read_as_is(self) -> State:
        """Also if what made the directory was killed before it wrote the file."""
        try:
            with open(os.path.join(self.path, STATE)) as handle:
                found = json.load(handle)
        except (OSError, ValueError):
            found = {}
        unknown: State = {"id": self.id, "bundle": "", "rootfs": "", "created": "", "owner": "", "annotations": {}}
        return {**unknown, "status": "stopped", "pid": 0, "sandbox": "", "netns": "", "cgroups": [], **found}

    def supervisor(self, state: State) -> SupervisorDir:
        return SupervisorDir(self.root, state["sandbox"] or "none")

    def remove(self) -> None:
        _remove(self.path)


class Store:
    """All containers below --root."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)

    def record(self, container_id: str) -> Record:
        """Raises OciError for what is no id."""
        if len(container_id) > ID_MAX or not _ID.fullmatch(container_id):
            raise OciError(f"invalid container ID format: {container_id!r}")
        return Record(self.root, container_id)

    def records(self) -> list[Record]:
        try:
            names = sorted(os.listdir(self.root))
        except OSError:
            return []
        return [Record(self.root, name) for name in names if _ID.fullmatch(name)]

    def sharing(self, netns: str) -> State | None:
        """A container in the network namespace DEVICE:INODE whose VM lives."""
        for record in self.records():
            state = record.read_as_is()
            if state["netns"] == netns and state["sandbox"] and record.supervisor(state).alive():
                return state
        return None

    def new_sandbox(self, container_id: str, usual_root: str) -> str:
        """A name for the VM of a new container: its id, if nobody else on this host can have that, or has it."""
        name = container_id
        plain = len(name) <= NAME_MAX and len(name) > 1 and name[0] not in "_+." and "+" not in name
        if not plain or not (_HEX_ID.fullmatch(name) or self.root == usual_root) or self._is_taken(name):
            name = f"{re.sub('[^a-zA-Z0-9.-]', '-', name).lstrip('-.')[:40] or 'oci'}-{os.urandom(6).hex()}"
        return name

    def _is_taken(self, sandbox_id: str) -> bool:
        """By a VM that goes on with other containers, without the one that it was made for."""
        supervisor = SupervisorDir(self.root, sandbox_id)
        if os.path.isdir(supervisor.path) and not supervisor.alive():
            supervisor.remove()  # left by one that was killed
        return os.path.isdir(supervisor.path)


def _remove(path: str) -> None:
    """A directory and the files in it. Idempotent. Raises OciError. shutil, which does more, takes 5 ms to load."""
    try:
        for name in os.listdir(path):
            os.unlink(os.path.join(path, name))
        os.rmdir(path)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise OciError(f"cannot remove {path}: {os.strerror(exc.errno or 0)}") from exc
