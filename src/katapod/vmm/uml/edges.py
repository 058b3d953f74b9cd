"""Edge-triggered events: one epoll(7) descriptor of a device's own within the event loop.

A descriptor that somebody hostile has sent is only watched, never read: an eventfd tells of each write to it by an edge
of its own, and a read of it could block. A socket is watched once, instead of being registered anew for each wait.
Whoever is told of an edge goes on until nothing more can be done.
"""

import asyncio
import select
from collections.abc import Callable

__all__ = ["READABLE", "WRITABLE", "Edges"]

READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
WRITABLE = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
EVENTS_MAX = 64  # that are told in one turn of the event loop


class Edges:
    """`failed` is called with what a handler raises; no handler is called after that."""

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._failed = failed
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._later: set[Callable[[], None]] = set()
        self._turn_follows = False
        self._loop.add_reader(self._epoll.fileno(), self._turn)

    def watch(self, fd: int, handler: Callable[[int], None]) -> None:
        """Have `handler` called with the events of each READABLE edge, the present state included. Raises OSError."""
        self._epoll.register(fd, READABLE | select.EPOLLET)
        self._handlers[fd] = handler

    def await_writable(self, fd: int, *, waiting: bool = True) -> None:
        """Have it called for WRITABLE ones too, or no longer: each read at the other end of a socket is one."""
        if fd in self._handlers:
            self._epoll.modify(fd, READABLE | select.EPOLLET | (select.EPOLLOUT if waiting else 0))

    def forget(self, fd: int) -> None:
        """To be called before `fd` is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def go_on_later(self, work: Callable[[], None]) -> None:
        """Have `work` called in another turn of the event loop, once, so that others have theirs before."""
        self._later.add(work)
        if not self._turn_follows:
            self._turn_follows = True
            self._loop.call_soon(self._turn)

    def close(self) -> None:
        """Idempotent."""
        if not self._epoll.closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
        self._handlers.clear()
        self._later.clear()

    def _turn(self) -> None:
        self._turn_follows = False
        if self._epoll.closed:
            return
        work, self._later = self._later, set()
        try:
            for fd, events in self._epoll.poll(0, EVENTS_MAX):
                handler = self._handlers.get(fd)
                if handler is not None:  # else a handler before it has closed it
                    handler(events)
            for each in work:
                each()
        except Exception as exc:
            self.close()
            self._failed(exc)
