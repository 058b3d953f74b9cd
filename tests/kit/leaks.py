"""What a test leaves on the machine: everything that Katapod can acquire, listed before and after.

Who is alone on the machine (one process of tests, no KATAPOD_TESTS_SHARED_HOST) answers for every new line at the end
of each test. A worker beside others answers at once for the lines with its own names; for a line that has nobody's
name it keeps the first test after which it was seen; kit.whole_run asks at the end of all whether it is still there.
"""

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from kit.kata import RUN_PREFIX, SHARED_HOST

__all__ = ["claim", "claimed_names", "expected", "find_leaks", "inventory", "lines_with", "settle", "strangers"]

TEMPLATES = "/run/vc/vm/template"
"""Templates and their locks may come with any start, and stay; what begins with a dot is a builder's, and may not."""

ROOTS = (
    "/run/vc/sbs",
    "/run/vc/vm",
    TEMPLATES,
    "/run/kata-containers/shared/sandboxes",
    "/var/lib/katapod/sandboxes",
    "/var/lib/katapod/images/refs",
    "/var/lib/katapod/images/tmp",
    "/run/netns",
    "/sys/class/net",
    "/dev/shm",
    "/run/containerd/s",  # sockets of shims
    "/run/containerd/fifo",
    "/run/containerd/runc",
    "/run/kata-runtime",  # of OCI engines
)
OWN_ROOTS = ("/run", "/var/lib")  # of these only what carries our names

MOUNT_ROOTS = ("/run/kata-containers/", "/run/vc/", "/var/lib/katapod/sandboxes/", "/var/lib/katapod/images/tmp/")
PROGRAMS = (
    "qemu-system-",
    "qemu-storage-daemon",
    "linux.uml",
    "virtiofsd",
    "kata-runtime",
    "katapod-proxy",
    "containerd",
    "ctr",
)
_claimed = {RUN_PREFIX}
_expected: list[Callable[[], Collection[str]]] = []
_strangers: dict[str, str] = {}
SETTLE_S = 180.0  # a process killed a moment ago may still be seen, and containerd runs a shim's `delete` on its own


def inventory() -> frozenset[str]:
    """All that Katapod has on this machine now, a line each."""
    return frozenset([*_processes(), *_mounts(), *_entries(), *_cgroups()])


def claim(identity: str) -> None:
    """Say that this name is of this test run too: an id that containerd chose, such as that of a pod."""
    _claimed.add(identity)


def claimed_names() -> frozenset[str]:
    """All that has been claimed, and what the names of this process's tests begin with."""
    return frozenset(_claimed)


def lines_with(lines: Iterable[str], names: Collection[str]) -> list[str]:
    """Those that carry one of the names."""
    return [line for line in lines if any(name in line for name in names)]


@contextlib.contextmanager
def expected(names: Callable[[], Collection[str]]) -> Iterator[None]:
    """While the block runs, new lines that carry one of these names are no leak of a test: of something that tests
    share, and whose parts are replaced as they use them. Whoever has it answers for them at its end."""
    _expected.append(names)
    try:
        yield
    finally:
        _expected.remove(names)


def find_leaks(before: frozenset[str], seen_after: str = "") -> list[str]:
    """What is there beyond `before`, after a moment to settle; beside others, of that what is ours.

    `seen_after` names the test for the lines that may be ours or another's.
    """
    if not SHARED_HOST:
        return settle(before)
    left, there = _settled(before, _claimed)
    for line in there - before:
        _strangers.setdefault(line, seen_after)
    return left


def strangers() -> dict[str, str]:
    """New lines that were not known to be ours, each with the first test after which it was seen."""
    return {line: test for line, test in _strangers.items() if not lines_with([line], _claimed)}


def settle(before: frozenset[str], names: Collection[str] | None = None) -> list[str]:
    """What is there beyond `before` (with `names`, of that what carries one) when it has had a moment to go."""
    return _settled(before, names)[0]


def _settled(before: frozenset[str], names: Collection[str] | None) -> tuple[list[str], frozenset[str]]:
    """As settle(), and all that was there at the last look."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        there = inventory()
        known = [name for each in _expected for name in each()]  # asked for later: by then they may have some more
        left = sorted(line for line in there - before if not lines_with([line], known))
        if names is not None:
            left = lines_with(left, names)
        if not left or time.monotonic() > deadline:
            return left, there
        time.sleep(0.1)


def _processes() -> Iterator[str]:
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            words = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        # a script's own name is the interpreter's first argument
        if os.path.basename(words[0]) == "containerd":  # a test may restart it: another process, the same daemon
            yield f"process {' '.join(words)}"
        elif any(os.path.basename(word).startswith(PROGRAMS) for word in words[:2]):
            yield f"process {entry}: {' '.join(words)[:200]}"


def _mounts() -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4]
        if point.startswith((*MOUNT_ROOTS, f"/run/{RUN_PREFIX}", f"/var/lib/{RUN_PREFIX}")) or " - nsfs " in line:
            yield f"mount {point}"


def _entries() -> Iterator[str]:
    for root in ROOTS:
        if os.path.isdir(root):
            yield from (f"entry {root}/{name}" for name in os.listdir(root) if not _may_stay(root, name))
    for root in OWN_ROOTS:
        yield from (f"entry {root}/{name}" for name in os.listdir(root) if name.startswith(RUN_PREFIX))
    yield from (f"entry {path}" for path in Path("/tmp").glob("katapod-*"))


def _may_stay(root: str, name: str) -> bool:
    """Templates; and what events have been told, which goes with this start of the host."""
    return (
        f"{root}/{name}" == TEMPLATES
        or name.startswith(".events.log")
        or (root == TEMPLATES and not name.startswith("."))
    )


def _cgroups() -> Iterator[str]:
    for folder, names, _ in os.walk("/sys/fs/cgroup"):
        yield from (f"cgroup {folder}/{name}" for name in names if "kata" in name or RUN_PREFIX in f"{folder}/{name}")
