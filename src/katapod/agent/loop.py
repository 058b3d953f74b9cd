"""A small event loop for `async def` coroutines, on epoll, SIGCHLD and a heap of timers.

It replaces asyncio, whose import takes 0.55 s of a boot under software emulation. It has what the agent needs: futures,
tasks with an owner and a name, and waiting for descriptors, time and children. Single-threaded; independent of the
agent.
"""

from __future__ import annotations

import collections
import heapq
import os
import select
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator
    from typing import Any

__all__ = ["Cancelled", "Event", "Future", "Lock", "Loop", "Task", "Tasks", "Turns"]

EXITS_KEPT_MAX = 4096  # exits of unknown processes, kept while a launch is in progress
MAIN = "main"
_IN, _OUT, _PRI = select.EPOLLIN, select.EPOLLOUT, select.EPOLLPRI
_BROKEN = select.EPOLLHUP | select.EPOLLERR


class Cancelled(BaseException):
    """Raised in a coroutine whose task is cancelled. Do not catch it."""


class Future:
    """A value that is set later; any number of tasks may await it."""

    __slots__ = ("_callbacks", "_error", "_value", "done")

    def __init__(self) -> None:
        self.done = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[], None]] = []

    def set(self, value: Any = None) -> None:
        if not self.done:
            self._value = value
            self._finish()

    def fail(self, error: BaseException) -> None:
        if not self.done:
            self._error = error
            self._finish()

    def _finish(self) -> None:
        self.done = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def on_done(self, callback: Callable[[], None]) -> None:
        """Call `callback` when this is done; immediately if it already is."""
        if self.done:
            callback()
        else:
            self._callbacks.append(callback)

    def forget(self, callback: Callable[[], None]) -> None:
        if callback in self._callbacks:
            self._callbacks.remove(callback)

    def result(self) -> Any:
        assert self.done
        if self._error is not None:
            raise self._error
        return self._value

    def __await__(self) -> Generator[Future, None, Any]:
        if not self.done:
            yield self
        return self.result()


class Task(Future):
    """A running coroutine; as a future it holds what the coroutine returns or raises."""

    __slots__ = ("_awaited", "_cancelled", "_coro", "_loop", "name")

    def __init__(self, loop: Loop, name: str, coro: Coroutine[Future, None, Any]) -> None:
        super().__init__()
        self.name = name
        self._loop = loop
        self._coro = coro
        self._cancelled = False
        self._awaited: Future | None = None
        self._wake()

    def _wake(self) -> None:
        self._awaited = None
        self._loop._ready.append(self)

    def cancel(self) -> None:
        """Raise Cancelled where the coroutine waits, or at its next wait. Idempotent."""
        if self.done or self._cancelled:
            return
        self._cancelled = True
        if self._awaited is not None:
            self._awaited.forget(self._wake)
            self._wake()

    def _step(self) -> None:
        if self.done:
            return
        try:
            if self._cancelled:
                self._cancelled = False
                awaited = self._coro.throw(Cancelled())
            else:
                awaited = self._coro.send(None)
        except StopIteration as stop:
            self.set(stop.value)
            return
        except Cancelled as exc:
            self.fail(exc)
            return
        except BaseException as exc:
            self.fail(exc)
            self._loop._task_failed(self, exc)
            return
        if self._cancelled:  # it cancelled itself while running
            self._wake()
        else:
            self._awaited = awaited
            awaited.on_done(self._wake)


class Event:
    """A flag that tasks can wait for."""

    def __init__(self) -> None:
        self._future = Future()

    @property
    def is_set(self) -> bool:
        return self._future.done

    def set(self) -> None:
        self._future.set()

    def clear(self) -> None:
        if self._future.done:
            self._future = Future()

    async def wait(self) -> None:
        await self._future


class Turns:
    """A semaphore in order of arrival, whose `limit` is evaluated at each entry and exit: `async with turns:`."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._held = 0
        self._waiting: collections.deque[Future] = collections.deque()

    async def __aenter__(self) -> None:
        if not self._waiting and self._held < self._limit():
            self._held += 1
            return
        turn = Future()
        self._waiting.append(turn)
        try:
            await turn
        except Cancelled:
            if turn.done:  # the turn was granted at the same moment: pass it on
                self._release()
            else:
                self._waiting.remove(turn)
            raise

    async def __aexit__(self, *exc: object) -> None:
        self._release()

    def _release(self) -> None:
        self._held -= 1
        while self._waiting and self._held < self._limit():
            self._held += 1
            self._waiting.popleft().set()


class Lock(Turns):
    """Mutual exclusion in order of arrival: `async with lock:`."""

    def __init__(self) -> None:
        super().__init__(lambda: 1)


class Tasks:
    """The tasks of one owner, cancelled together."""

    def __init__(self, loop: Loop, owner: str) -> None:
        self._loop = loop
        self._owner = owner
        self._running: set[Task] = set()

    def __len__(self) -> int:
        return len(self._running)

    def spawn(self, name: str, coro: Coroutine[Future, None, Any]) -> Task:
        task = Task(self._loop, f"{self._owner}/{name}", coro)
        self._running.add(task)
        task.on_done(lambda: self._running.discard(task))
        return task

    def cancel(self) -> None:
        for task in list(self._running):
            task.cancel()


class _Watch:
    """Waiters for the readiness of one descriptor."""

    __slots__ = ("armed", "edge", "edge_mask", "waiters")

    def __init__(self) -> None:
        self.armed = 0
        self.waiters: list[tuple[int, Future]] = []
        self.edge: Future | None = None
        self.edge_mask = 0


class Loop:
    """Runs tasks until stopped. Handles SIGCHLD; there can be one per process at a time."""

    def __init__(self) -> None:
        self._ready: collections.deque[Task] = collections.deque()
        self._timers: list[tuple[float, int, Future]] = []
        self._timer_count = 0
        self._epoll = select.epoll()
        self._watches: dict[int, _Watch] = {}
        self._children: dict[int, Future] = {}
        self._launches = 0
        self._exits: dict[int, int] = {}
        self._failure: BaseException | None = None
        self.on_signal: Callable[[int], None] = lambda number: None
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._epoll.register(self._wake_read, _IN)
        self._old_wakeup = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._old_handler = signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def close(self) -> None:
        """Restore signals and close descriptors. Remaining tasks are dropped."""
        signal.set_wakeup_fd(self._old_wakeup)
        signal.signal(signal.SIGCHLD, self._old_handler)
        self._epoll.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    # tasks and time

    def run(self, main: Coroutine[Future, None, Any]) -> Any:
        """Run until `main` ends; return or raise what it did. An exception that leaves any other task ends
        the run too: tasks handle what they expect."""
        task = Task(self, MAIN, main)
        while True:
            for _ in range(len(self._ready)):
                self._ready.popleft()._step()
            if self._failure is not None:
                raise self._failure
            if task.done:
                return task.result()
            self._wait()

    def _task_failed(self, task: Task, error: BaseException) -> None:
        if task.name != MAIN and self._failure is None:
            error.add_note(f"in task {task.name}")
            self._failure = error

    async def turn(self) -> None:
        """Let all other ready tasks run once."""
        future = Future()
        self._timer_count += 1
        heapq.heappush(self._timers, (0.0, self._timer_count, future))
        await future

    async def sleep(self, seconds: float) -> None:
        await self._timer(seconds)

    def _timer(self, seconds: float) -> Future:
        future = Future()
        self._timer_count += 1
        heapq.heappush(self._timers, (time.monotonic() + seconds, self._timer_count, future))
        return future

    async def wait_any(self, futures: list[Future], seconds: float | None = None) -> bool:
        """Wait until one of `futures` is done; False if `seconds` passed first."""
        any_done = Future()
        for future in futures:
            future.on_done(any_done.set)
        timer = None
        if seconds is not None and not any_done.done:
            timer = self._timer(seconds)
            timer.on_done(any_done.set)
        try:
            await any_done
        finally:
            for future in futures:
                future.forget(any_done.set)
            if timer is not None and not timer.done:
                timer.forget(any_done.set)
        return any(future.done for future in futures)

    # descriptors

    async def readable(self, fd: int, seconds: float | None = None) -> bool:
        return await self._ready_for(fd, _IN, seconds)

    async def writable(self, fd: int, seconds: float | None = None) -> bool:
        return await self._ready_for(fd, _OUT, seconds)

    async def urgent(self, fd: int) -> None:
        """Wait for EPOLLPRI: how cgroup files say that their content changed."""
        await self._ready_for(fd, _PRI, None)

    def watch_readable(self, fd: int, future: Future) -> Callable[[], None]:
        """Set `future` once `fd` is readable; returns a function that ends the watch."""
        return self._watch(fd, _IN, future)

    async def _ready_for(self, fd: int, mask: int, seconds: float | None) -> bool:
        future = Future()
        end = self._watch(fd, mask, future)
        try:
            if seconds is None:
                await future
                return True
            return await self.wait_any([future], seconds)
        finally:
            end()

    def _watch(self, fd: int, mask: int, future: Future) -> Callable[[], None]:
        watch = self._watches.get(fd)
        if watch is None:
            watch = self._watches[fd] = _Watch()
        entry = (mask, future)
        watch.waiters.append(entry)
        self._arm(fd, watch)

        def end() -> None:
            if entry in watch.waiters:
                watch.waiters.remove(entry)

        return end

    def _arm(self, fd: int, watch: _Watch) -> None:
        # One-shot: a descriptor without waiters stays registered but disabled, which saves system calls.
        mask = select.EPOLLONESHOT
        for wanted, _ in watch.waiters:
            mask |= wanted
        if mask == watch.armed:
            return
        if watch.armed:
            self._epoll.modify(fd, mask)
        else:
            self._epoll.register(fd, mask)
        watch.armed = mask

    async def next_edge(self, fd: int) -> int:
        """Wait for the next change of `fd`'s readiness (edge triggered; the first call reports the state
        as it is) and return its epoll mask. End with `forget`."""
        watch = self._watches.get(fd)
        if watch is None:
            watch = self._watches[fd] = _Watch()
            self._epoll.register(fd, _IN | _OUT | select.EPOLLET)
        if not watch.edge_mask:
            watch.edge = Future()
            try:
                await watch.edge
            finally:
                watch.edge = None
        mask, watch.edge_mask = watch.edge_mask, 0
        return mask

    def forget(self, fd: int) -> None:
        """Stop watching `fd`; tasks that wait for it are woken. Call this before closing it."""
        watch = self._watches.pop(fd, None)
        if watch is None:
            return
        self._epoll.unregister(fd)
        for _, future in watch.waiters:
            future.set()

    def close_fd(self, fd: int) -> None:
        self.forget(fd)
        os.close(fd)

    # children

    def child_exit(self, pid: int) -> Future:
        """A future for the wait status of a child that this process has just started."""
        if pid not in self._children:
            self._children[pid] = Future()
        return self._children[pid]

    def launch_begins(self) -> None:
        """Until `launch_ends`, record the exits of unknown children: one of them may be asked for."""
        self._launches += 1

    def launch_ends(self) -> None:
        self._launches -= 1
        if not self._launches:
            self._exits.clear()

    def adopted_exit(self, pid: int) -> Future:
        """Like child_exit, for a process that became our child since `launch_begins`."""
        future = self.child_exit(pid)
        if pid in self._exits:
            del self._children[pid]
            future.set(self._exits.pop(pid))
        return future

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            future = self._children.pop(pid, None)
            if future is not None:
                future.set(status)
            elif self._launches:
                if len(self._exits) >= EXITS_KEPT_MAX:
                    self._exits.pop(next(iter(self._exits)))
                self._exits[pid] = status

    # one iteration

    def _wait(self) -> None:
        """Wait until a task becomes ready."""
        timeout = -1.0
        if self._ready:
            timeout = 0
        elif self._timers:
            timeout = max(0.0, self._timers[0][0] - time.monotonic())
        for fd, mask in self._epoll.poll(timeout):
            if fd == self._wake_read:
                self._signalled()
            else:
                self._fd_event(fd, mask)
        if self._timers:
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2].set()

    def _fd_event(self, fd: int, mask: int) -> None:
        watch = self._watches.get(fd)
        if watch is None:
            return
        if not watch.armed:
            watch.edge_mask = mask
            if watch.edge is not None:
                watch.edge.set()
            return
        watch.armed = select.EPOLLONESHOT
        waiters, watch.waiters = watch.waiters, []
        left = []
        for entry in waiters:
            if mask & (entry[0] | _BROKEN):
                entry[1].set()
            else:
                left.append(entry)
        if left:
            watch.waiters = left
            self._arm(fd, watch)

    def _signalled(self) -> None:
        for number in os.read(self._wake_read, 4096):
            if number != signal.SIGCHLD:
                self.on_signal(number)
        self._reap()
