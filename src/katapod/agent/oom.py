"""Out-of-memory kills: each container's memory.events is watched; the host learns of them by a long poll.

cgroup v2 wakes pollers of memory.events with EPOLLPRI when it changes.
"""

from __future__ import annotations

import collections
import os

from katapod.agent import log
from katapod.agent.loop import Event, Loop, Tasks
from katapod.agent.paths import CGROUP_ROOT

__all__ = ["OomWatch", "parse_oom_kills"]

EVENTS_MAX = 256  # kept until the host asks; the oldest are dropped


def parse_oom_kills(text: str) -> int:
    """The oom_kill count of memory.events: processes of the cgroup that the kernel has killed."""
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == "oom_kill":
            return int(value)
    return 0


class OomWatch:
    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._tasks = Tasks(loop, "oom")
        self._events: collections.deque[str] = collections.deque(maxlen=EVENTS_MAX)
        self._arrived = Event()
        self._files: dict[str, int] = {}
        self._kills: dict[str, int] = {}

    def watch(self, container_id: str, cgroup: str) -> None:
        """Watch a container until `forget`. Raises OSError."""
        fd = os.open(f"{CGROUP_ROOT}{cgroup}/memory.events", os.O_RDONLY | os.O_CLOEXEC)
        self._files[container_id] = fd
        self._kills[container_id] = parse_oom_kills(os.pread(fd, 4096, 0).decode())
        self._tasks.spawn(container_id, self._follow(container_id, fd))

    def check(self, container_id: str) -> None:
        """Check now: a container's exit must not be reported before its cause."""
        fd = self._files.get(container_id)
        if fd is None:
            return
        try:
            kills = parse_oom_kills(os.pread(fd, 4096, 0).decode())
        except OSError:
            return  # ENODEV: the cgroup is gone
        if kills > self._kills[container_id]:
            self._kills[container_id] = kills
            log.info(f"container {container_id}: the kernel killed a process that exceeded the memory limit")
            if container_id not in self._events:  # one per container is enough, and leaves room for others
                self._events.append(container_id)
            self._arrived.set()

    def forget(self, container_id: str) -> None:
        fd = self._files.pop(container_id, None)
        if fd is not None:
            self._loop.close_fd(fd)

    async def next_event(self) -> str:
        """The id of the next container that lost a process to the OOM killer."""
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        return self._events.popleft()

    async def _follow(self, container_id: str, fd: int) -> None:
        while self._files.get(container_id) == fd:
            await self._loop.urgent(fd)
            if self._files.get(container_id) != fd:
                return
            self.check(container_id)
            if not os.path.exists(f"/proc/self/fd/{fd}"):
                return
            await self._loop.sleep(0.05)  # a cgroup at its limit changes this file very often
