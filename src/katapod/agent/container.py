"""What the agent knows of one container. The calls that change it are in containers.py."""

from __future__ import annotations

from katapod.agent.paths import CGROUP_ROOT, bundle_of
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from katapod.agent.process import Process
    from katapod.agent.spare import Spare

__all__ = ["Container"]


class Container:
    """A container that crun has created."""

    def __init__(self, container_id: str, cgroup: str) -> None:
        self.id = container_id
        self.cgroup = cgroup
        self.state = "creating"  # creating, created, running, paused, stopped
        self.init_pid = 0
        self.annotations: dict[str, str] = {}
        self.has_poststart = False
        self.processes: dict[str, Process] = {}
        self.undo: list[Callable[[], None]] = []
        self.binds: list[tuple[str, str]] = []
        self.shared_paths: list[str] = []
        self.spare: Spare | None = None

    @property
    def bundle(self) -> str:
        return bundle_of(self.id)

    @property
    def cgroup_directory(self) -> str:
        return f"{CGROUP_ROOT}{self.cgroup}"

    def require(self, *states: str, verb: str) -> None:
        """Raises RpcError (FAILED_PRECONDITION)."""
        if self.state not in states:
            raise RpcError(
                StatusCode.FAILED_PRECONDITION,
                f"cannot {verb} container {self.id} in state {self.state}; needs {' or '.join(states)}",
            )
