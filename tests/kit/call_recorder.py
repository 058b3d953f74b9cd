"""Which system calls jailed programs make beyond a list, with the arguments that such lists look at.

While a recorder is in place, jails with a list get a filter that tells of each call that is not on it, and lets it go
on. It hears of the calls of processes that are traced, too, which strace(1) cannot follow.
"""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from katapod.host import jail_entry
from katapod.kernel.seccomp import add_filter, let_continue, next_notice, refuse
from katapod.plan.call_filter import ENOSYS, CallFilter, CallRule, assemble

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")  # package linux-libc-dev
SENDMSG = CallRule("sendmsg", 46)  # by which a jailed process hands over its listener

ANY = -1
REFUSED_TO_UML = ((157, ANY), (62, signal.SIGABRT))  # prctl, kill: see vmm/uml/system_calls.py
REFUSED_TO_QEMU = ((435, ANY), (425, ANY), (426, ANY), (427, ANY))  # clone3, io_uring_...: see vmm/qemu/jail_calls.py
"""What lists leave out on purpose, and programs do without: a call, and its second argument."""
ALL_OTHERS = assemble(CallFilter((), refused=(("none", 0),)))[-8:]  # a program that allows them ends so

Calls = dict[int, set[tuple[int, ...]]]


@dataclass
class Recording:
    """Calls by number, with the lower halves of their first four arguments. Empty until the recorder has ended."""

    calls: Calls = field(default_factory=dict)


_open: list[Recording] = []  # the outer ones get what the inner ones see


def call_names() -> dict[int, str]:
    found = re.findall(r"^#define __NR_(\w+) (\d+)$", HEADER.read_text(), re.MULTILINE)
    return {int(number): name for name, number in found}


@contextlib.contextmanager
def recording(
    listed: tuple[CallRule, ...], refused: tuple[tuple[int, int], ...] = REFUSED_TO_UML
) -> Iterator[Recording]:
    """The recording is there when the block has ended, and all programs in jails with it."""
    program = assemble(CallFilter((SENDMSG, *listed), watched=True))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    recorder = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno()), json.dumps(refused)],
        pass_fds=[theirs.fileno()],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    theirs.close()

    def filter_calls(planned: bytes) -> int:
        if planned.endswith(ALL_OTHERS):
            return add_filter(planned)
        if not planned:
            return 0  # a program that may make all calls
        listener = add_filter(program, listen=True)
        return socket.send_fds(ours, [b"."], [listener])

    done = Recording()
    outer = list(_open)
    _open.append(done)
    try:
        with mock.patch.object(jail_entry, "_filter_calls", filter_calls):
            yield done
    finally:
        _open.pop()
        ours.close()
        said, _ = recorder.communicate()
    for number, seen in json.loads(said).items():
        for recorded in (done, *outer):
            recorded.calls.setdefault(int(number), set()).update(map(tuple, seen))


def main(handed: socket.socket, refused: set[tuple[int, int]]) -> None:
    """Answer until nobody can hand over a listener any more, and those that were have nobody left."""
    poll = select.poll()
    poll.register(handed, select.POLLIN)
    listeners: set[int] = set()
    seen: Calls = {}
    while listeners or handed.fileno() >= 0:
        for fd, event in poll.poll():
            if fd == handed.fileno():
                words, fds, _, _ = socket.recv_fds(handed, 1, 1)
                listeners.update(fds)
                for each in fds:
                    poll.register(each, select.POLLIN)
                if not words:
                    poll.unregister(fd)
                    handed.close()
            elif event & select.POLLIN:
                with contextlib.suppress(FileNotFoundError):  # the caller was killed
                    notice = next_notice(fd)
                    arguments = tuple(each & 0xFFFFFFFF for each in notice.arguments[:4])
                    if {(notice.number, ANY), (notice.number, arguments[1])} & refused:
                        refuse(fd, notice, ENOSYS)
                        continue
                    let_continue(fd, notice)
                    seen.setdefault(notice.number, set()).add(arguments)
            else:
                poll.unregister(fd)
                listeners.discard(fd)
                os.close(fd)
    json.dump({number: sorted(calls) for number, calls in seen.items()}, sys.stdout)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), {(number, second) for number, second in json.loads(sys.argv[2])})
