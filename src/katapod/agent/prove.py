"""The self-test of a guest image: booted with katapod.prove=TOKEN, it checks the parts that everything else needs and
reports in one line on the console."""

from __future__ import annotations

import os

from katapod.agent import init, methods
from katapod.agent.loop import Loop
from katapod.agent.program import ProgramError, run

__all__ = ["prove"]

LIMIT_S = 30.0


class NotProven(Exception):
    """A part of the image is missing or does not work."""


def _check(is_init: bool) -> None:
    failures = init.load_list(init.MODULES_EARLY) + init.load_list(init.MODULES_LATE)
    if failures:
        raise NotProven("; ".join(failures))
    if is_init:
        init.late()
    with open(f"{init.CGROUP}/cgroup.subtree_control") as handle:
        enabled = handle.read().split()
    for name in ("cpu", "memory", "pids"):
        if name not in enabled:
            raise NotProven(f"the cgroup v2 controller {name} is missing")
    with open("/proc/filesystems") as handle:
        known = handle.read().split()
    for name in ("virtiofs", "overlay", "tmpfs"):
        if name not in known:
            raise NotProven(f"the kernel lacks the file system {name}")
    for entry in methods.METHODS:
        methods.load_method(*entry.split("/"))
    loop = Loop()
    try:
        loop.run(run(loop, ["crun", "--version"], LIMIT_S))
    finally:
        loop.close()


def prove(token: str, is_init: bool = True) -> None:
    """Print the line. The caller powers off."""
    try:
        _check(is_init)
    except (OSError, NotProven, ProgramError, ImportError) as exc:
        init.say(f"katapod-agent: not proven: {exc}")
        return
    os.sync()
    init.say(f"katapod-agent: proven {token}")
