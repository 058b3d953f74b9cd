"""`kata-runtime factory init` with vm_cache_number above 0: the process that keeps a pool of machines.

It forks members (pool_member.py), hands each client's connection to one that is ready, and forks the next. It runs
no event loop and no thread, so that a fork is safe, and never waits for a client or a member: it only passes on.
"""

import contextlib
import fcntl
import logging
import os
import selectors
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from katapod.model.errors import AlreadyExists, KatapodError
from katapod.supervisor import pool_wire as wire
from katapod.supervisor.pool_member import MemberReport

__all__ = ["PoolServer", "ServerStatus", "listening"]

log = logging.getLogger(__name__)

CLIENTS_MAX = 64  # that have connected and not yet said what they want
CLIENT_LIMIT_S = 30.0  # for a client that has connected to say what it wants
PAUSE_FIRST_S, PAUSE_MAX_S = 1.0, 60.0  # after a member that failed, doubled each time
END_LIMIT_S = 15.0  # for idle members to end with us
ENDED = (signal.SIGTERM, signal.SIGINT)
REPORT_MAX = 4096


class VmStatus(msgspec.Struct, frozen=True):
    pid: int
    cpu: int
    memory: int  # MiB


class ServerStatus(msgspec.Struct, frozen=True):
    """The answer to `factory status`."""

    pid: int
    vms: tuple[VmStatus, ...]


class _Member:
    """A forked process, as far as we know. `report` is set when its machine is ready, `taken` for good."""

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self.control = control
        self.report: MemberReport | None = None
        self.is_ready = False
        self.is_taken = False


class PoolServer:
    """Keeps `number` machines ready. `member_main` is what a forked member does with its end of a socket."""

    def __init__(
        self,
        listener: socket.socket,
        number: int,
        member_main: Callable[[socket.socket], int],
        clean_up: Callable[[], None],
    ) -> None:
        self._listener = listener
        self._number = number
        self._member_main = member_main
        self._clean_up = clean_up
        self._selector = selectors.DefaultSelector()
        self._members: dict[int, _Member] = {}
        self._helpers: set[int] = set()  # processes that clean up
        self._waiting: dict[socket.socket, float] = {}  # clients, and until when they may say what they want
        self._ending = False
        self._hear_of_end: list[socket.socket] = []  # clients that asked for it
        self._told = False
        self._pause_s = 0.0
        self._next_fork = 0.0

    def serve(self) -> None:
        """Until SIGTERM, SIGINT or a client's QUIT; then idle members end, and those that are taken go on alone."""
        wakeup, wakeup_writer = socket.socketpair()
        with wakeup, wakeup_writer, self._selector:
            for sock in (wakeup, wakeup_writer, self._listener):
                sock.setblocking(False)
            signal.set_wakeup_fd(wakeup_writer.fileno(), warn_on_full_buffer=False)
            for number in (*ENDED, signal.SIGCHLD):
                signal.signal(number, lambda *_: None)
            self._selector.register(wakeup, selectors.EVENT_READ, self._on_signal)
            self._selector.register(self._listener, selectors.EVENT_READ, self._on_connect)
            while not self._ending:
                self._refill()
                for key, _ in self._selector.select(self._timeout_s()):
                    key.data(key.fileobj)
                self._drop_slow_clients()
            self._end_members()
        for client in self._hear_of_end:
            self._answer(client, wire.QUIT)
            client.close()

    def _timeout_s(self) -> float | None:
        moments = [*self._waiting.values()]
        if self._is_short():
            moments.append(self._next_fork)
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    # members

    def _idle(self) -> list[_Member]:
        return [member for member in self._members.values() if not member.is_taken]

    def _is_short(self) -> bool:
        """Whether to start a machine: one after the other, since each takes the CPU from those that run."""
        idle = self._idle()
        return len(idle) < self._number and all(member.report is not None for member in idle)

    def _refill(self) -> None:
        if self._is_short() and time.monotonic() >= self._next_fork:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

            def live() -> int:
                ours.close()  # or its end would never be seen
                return self._member_main(theirs)

            pid = self._fork(live)
            theirs.close()
            ours.setblocking(False)
            member = self._members[pid] = _Member(pid, ours)
            self._selector.register(ours, selectors.EVENT_READ, lambda _: self._on_report(member))

    def _fork(self, work: Callable[[], int]) -> int:
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            os.setsid()  # a Ctrl-C at the server's terminal is not for those that are taken
            signal.set_wakeup_fd(-1)
            for number in (*ENDED, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            for item in [key.fileobj for key in self._selector.get_map().values()]:
                if isinstance(item, socket.socket):
                    item.close()
            self._selector.close()
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            os.dup2(null, 0)
            os.dup2(null, 1)
            os.close(null)
            status = work()
        finally:
            os._exit(status)

    def _on_report(self, member: _Member) -> None:
        try:
            data = member.control.recv(REPORT_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data == b"taken":
            member.is_taken = True
        elif data:
            member.report = msgspec.json.decode(data, type=MemberReport)
            member.is_ready = True
            self._pause_s = 0.0
            self._tell_ready()
        else:
            self._forget(member)

    def _tell_ready(self) -> None:
        if not self._told and len([member for member in self._idle() if member.is_ready]) >= self._number:
            self._told = True
            print("vm factory initialized", flush=True)

    def _forget(self, member: _Member) -> None:
        """Its socket has come to its end; its process will, if it has not been taken."""
        if member.control.fileno() >= 0:
            self._selector.unregister(member.control)
            member.control.close()
        member.is_ready = False

    def _on_signal(self, wakeup: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            self._ending |= any(number in ENDED for number in wakeup.recv(4096))
        self._reap()

    def _reap(self) -> None:
        while self._members or self._helpers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._helpers.discard(pid)
            member = self._members.pop(pid, None)
            if member is None:
                continue
            self._forget(member)
            code = os.waitstatus_to_exitcode(status)
            if code < 0:  # killed: what it held is still there
                self._helpers.add(self._fork(self._run_clean_up))
            if code != 0 and not member.is_taken:
                self._pause_s = min(max(PAUSE_FIRST_S, self._pause_s * 2), PAUSE_MAX_S)
                self._next_fork = time.monotonic() + self._pause_s
                log.warning("a machine of the pool failed; the next one is started in %g s", self._pause_s)

    def _run_clean_up(self) -> int:
        self._clean_up()
        return 0

    def _end_members(self) -> None:
        """Their sockets tell idle members that we go. Who does not go with us is killed and cleaned up after."""
        for client in [self._listener, *self._waiting]:
            self._selector.unregister(client)
            client.close()
        for member in self._idle():
            with contextlib.suppress(OSError):
                member.control.shutdown(socket.SHUT_WR)  # who is just being taken can still tell us
        deadline = time.monotonic() + END_LIMIT_S
        while self._idle() or self._helpers:
            for key, _ in self._selector.select(max(0.0, deadline - time.monotonic())):
                key.data(key.fileobj)
            if time.monotonic() > deadline:
                deadline += END_LIMIT_S
                for member in self._idle():
                    os.kill(member.pid, signal.SIGKILL)

    # clients

    def _on_connect(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            client, _ = listener.accept()
            if len(self._waiting) >= CLIENTS_MAX:
                client.close()
                return
            client.setblocking(False)
            self._waiting[client] = time.monotonic() + CLIENT_LIMIT_S
            self._selector.register(client, selectors.EVENT_READ, self._on_client)

    def _on_client(self, client: socket.socket) -> None:
        """Look at the kind of its request, and leave the request where it is: a member reads it."""
        try:
            head = client.recv(wire.HEADER, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            head = b""
        if head and len(head) < wire.HEADER:
            return
        self._selector.unregister(client)
        del self._waiting[client]
        if head[4:] == wire.QUIT:
            self._hear_of_end.append(client)
            self._ending = True
            return
        with client:
            if head[4:] == wire.STATUS:
                self._answer(client, wire.STATUS, msgspec.json.encode(self._status()))
            elif head[4:] == wire.REQUEST and not self._hand_over(client):
                self._answer(client, wire.REFUSED)

    def _hand_over(self, client: socket.socket) -> bool:
        """Whether there was a machine ready for it."""
        for member in self._idle():
            if member.is_ready:
                member.is_ready = False
                with contextlib.suppress(OSError):  # it has just ended
                    socket.send_fds(member.control, [wire.REQUEST], [client.fileno()])
                    return True
        return False

    def _answer(self, client: socket.socket, kind: bytes, payload: bytes = b"") -> None:
        with contextlib.suppress(OSError):
            client.sendall(wire.frame(kind, payload))

    def _status(self) -> ServerStatus:
        reports = [member.report for member in self._idle() if member.is_ready]
        return ServerStatus(
            os.getpid(), tuple(VmStatus(item.vmm_pid, item.vcpus, item.mem_mib) for item in reports if item is not None)
        )

    def _drop_slow_clients(self) -> None:
        now = time.monotonic()
        for client in [client for client, limit in self._waiting.items() if now > limit]:
            self._selector.unregister(client)
            del self._waiting[client]
            client.close()


@contextlib.contextmanager
def listening(endpoint: Path) -> Iterator[socket.socket]:
    """Listen on the socket, for root only, while the block runs. What a killed server left is replaced.

    Raises AlreadyExists if another server is there, KatapodError.
    """
    lock_path = endpoint.with_name(f"{endpoint.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            endpoint.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, lock)
        except OSError as exc:
            raise KatapodError(f"cannot serve on {endpoint}: {exc.strerror}") from exc
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: members that outlive us would hold that too
        except BlockingIOError as exc:
            pid = os.read(lock, 32).decode(errors="replace").strip()
            raise AlreadyExists(
                f"cannot serve on {endpoint}: another server does, process {pid}",
                hint="kata-runtime factory destroy ends it",
            ) from exc
        os.truncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISSOCK(os.lstat(endpoint).st_mode):
                    raise KatapodError(f"cannot serve on {endpoint}: the file there is not a socket")
                os.unlink(endpoint)
            before = os.umask(0o177)
            try:
                listener.bind(str(endpoint))
            finally:
                os.umask(before)
            stack.callback(endpoint.unlink, missing_ok=True)
            listener.listen(128)
        except OSError as exc:
            raise KatapodError(f"cannot serve on {endpoint}: {exc.strerror or exc}") from exc
        yield listener
