"""Limits that the kernel derives from its memory at boot, adapted to the memory that the guest has now.

A clone boots with its template's memory, and a pod grows with its containers; the kernel itself then changes few of
these limits. The formulas are the kernel's (names of files and functions below are those of Linux 6.1; 6.12 has the
same). What has been set otherwise, by sysctl or on the kernel command line, is kept.
"""

from __future__ import annotations

import os

from katapod.agent import log
from katapod.agent.paths import SANDBOX
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Values = Mapping[str, tuple[int, ...]]

__all__ = [
    "KEYS",
    "Limits",
    "allow_open_files",
    "derive_conntrack",
    "derive_limits",
    "open_files_limit",
    "parse_high_pages",
]

PROC_SYS = "/proc/sys"
PAGE = os.sysconf("SC_PAGE_SIZE")
THREAD_COST = 8 * (16 << 10)  # set_max_threads(): an eighth of memory for stacks of THREAD_SIZE
EPOLL_COST = 184  # EP_ITEM_COST of a 64-bit kernel
PEER_COST = 192  # struct inet_peer, rounded up to cache lines
INODE_BYTES = 632  # struct inode, unless sysfs has its size
INOTIFY_MARK_BYTES = 80  # struct inotify_inode_mark
PAGE_STRUCT = 64  # struct page: the kernel's list of memory costs 1/64
FILES_MIN = 8192  # NR_FILE
WATCHES_MIN, WATCHES_MAX = 8192, 1 << 20
HUGE_PAGES_FROM = 512 << 20  # hugepage_init() disables huge pages below this
HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage"
HUGE_PAGES_BUILT = "/etc/katapod/transparent-hugepages"
HUGE_PAGE_DEFAULTS = (("defrag", "madvise"), ("khugepaged/defrag", "1"), ("use_zero_page", "1"))
OPEN_FILES = 1 << 20  # what engines set for containers: the kernel's default of fs.nr_open
OPEN_FILES_MAX = 0x7FFFFFC0  # sysctl_nr_open_max of a 64-bit kernel, fs/file.c

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
KEYS = (
    "kernel/threads-max",
    *(f"user/max_{kind}_namespaces" for kind in NAMESPACES),
    "user/max_inotify_watches",
    "user/max_fanotify_marks",
    "fs/file-max",
    "fs/epoll/max_user_watches",
    "net/ipv4/inet_peer_threshold",
    "net/ipv4/tcp_mem",
    "net/ipv4/udp_mem",
    "net/ipv4/tcp_rmem",
    "net/ipv4/tcp_wmem",
    "net/ipv4/tcp_max_orphans",
    "net/ipv4/tcp_max_tw_buckets",
    "net/ipv4/tcp_max_syn_backlog",
)  # fs/inotify/max_user_watches and fs/fanotify/max_user_marks are aliases of the two in user/
CONNTRACK = ("net/netfilter/nf_conntrack_buckets", "net/netfilter/nf_conntrack_max")
TMPFS = ("/", "/dev", "/dev/shm", "/run", "/tmp")  # the guest's own; half of memory each


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _hash_bytes(memory: int) -> int:
    """Memory of the hash tables of dentries and inodes (fs/dcache.c, fs/inode.c), allocated before memory is counted: a
    pointer per 8 KiB and per 16 KiB."""
    return 8 * (_power_of_two(memory >> 13) + _power_of_two(memory >> 14))


def _clamp(number: int, low: int, high: int) -> int:
    return max(low, min(number, high))


def _memory_at_boot(boot: Values) -> int:
    """totalram_pages() at the time when the kernel derived its limits, from eventpoll_init(), which takes 1/25 of
    it."""
    if watches := boot.get("fs/epoll/max_user_watches"):
        return watches[0] * EPOLL_COST * 25
    return boot["kernel/threads-max"][0] * THREAD_COST


def grown_memory(boot: Values, added: int) -> int:
    """Bytes that the kernel would have counted if it had booted with `added` bytes more."""
    before = _memory_at_boot(boot)
    after = before + added - added * PAGE_STRUCT // PAGE
    return after - (_hash_bytes(after) - _hash_bytes(before))


def derive_limits(boot: Values, added: int, *, high_pages: int, inode_bytes: int = INODE_BYTES) -> dict[str, str]:
    """The kernel's values for KEYS after a boot with `added` bytes more, from those of the actual boot.

    `high_pages`: the zones' current high watermarks, which buffers may not use. Pure.
    """
    before, memory = _memory_at_boot(boot), grown_memory(boot, added)
    derived: dict[str, str] = {}
    threads = boot["kernel/threads-max"][0] + (memory - before) // THREAD_COST  # kernel/fork.c, set_max_threads()
    derived["kernel/threads-max"] = f"{threads}"
    for kind in NAMESPACES:  # kernel/fork.c, fork_init()
        derived[f"user/max_{kind}_namespaces"] = f"{threads // 2}"
    # fs/notify/inotify/inotify_user.c and fanotify_user.c: a hundredth of memory
    watch = INOTIFY_MARK_BYTES + 2 * inode_bytes
    derived["user/max_inotify_watches"] = f"{_clamp(memory // 100 // watch, WATCHES_MIN, WATCHES_MAX)}"
    derived["user/max_fanotify_marks"] = f"{_clamp(memory // 100 // (2 * inode_bytes), WATCHES_MIN, WATCHES_MAX)}"
    if files := boot.get("fs/file-max"):  # fs/file_table.c, files_maxfiles_init(): a tenth, 1 KiB each
        derived["fs/file-max"] = f"{max(FILES_MIN, files[0] + (memory - before) // 10240)}"
    derived["fs/epoll/max_user_watches"] = f"{memory // 25 // EPOLL_COST}"  # fs/eventpoll.c
    # net/ipv4/inetpeer.c, inet_initpeers()
    derived["net/ipv4/inet_peer_threshold"] = f"{_clamp(memory // 100 // PEER_COST, 4096, 65536 + 128)}"
    return derived | _derive_network(boot, memory, max(128, memory // PAGE - high_pages))


def _derive_network(boot: Values, memory: int, buffers: int) -> dict[str, str]:
    """`buffers`: nr_free_buffer_pages(). Sources: net/ipv4/tcp.c (tcp_init, tcp_init_mem), udp.c (udp_init),
    tcp_ipv4.c (tcp_sk_init). The hash table itself does not grow; the limits are those of a larger one."""
    derived = {}
    for key, part in (("net/ipv4/tcp_mem", 16), ("net/ipv4/udp_mem", 8)):
        limit = max(128, buffers // part)
        derived[key] = f"{limit // 4 * 3} {limit} {limit // 4 * 3 * 2}"
    share = buffers * (PAGE >> 7)
    for key, floor, ceiling in (("net/ipv4/tcp_wmem", 64 << 10, 4 << 20), ("net/ipv4/tcp_rmem", 128 << 10, 6 << 20)):
        if sizes := boot.get(key):
            derived[key] = f"{sizes[0]} {sizes[1]} {max(floor, min(ceiling, share))}"
    buckets = min(512 << 10, _power_of_two(memory >> 17))  # one for each 128 KiB
    derived["net/ipv4/tcp_max_orphans"] = derived["net/ipv4/tcp_max_tw_buckets"] = f"{buckets // 2}"
    derived["net/ipv4/tcp_max_syn_backlog"] = f"{max(128, buckets // 128)}"
    return derived


def derive_conntrack(memory: int) -> int:
    """Buckets and entries of connection tracking: net/netfilter/nf_conntrack_core.c, nf_conntrack_init_start()."""
    if memory > 4 << 30:
        return 262144
    if memory > 1 << 30:
        return 65536
    return max(1024, memory // 16384 // 8)


def parse_high_pages(zoneinfo: str) -> int:
    """The sum of the zones' high watermarks. Source: proc(5), /proc/zoneinfo."""
    words = (line.split() for line in zoneinfo.splitlines() if line.lstrip().startswith("high "))
    return sum(int(word[1]) for word in words if len(word) == 2)


def _read(path: str) -> str:
    """Empty if it does not exist: that depends on the kernel configuration."""
    try:
        with open(path) as handle:
            return handle.read()
    except OSError:
        return ""


def _numbers(key: str) -> tuple[int, ...]:
    return tuple(int(word) for word in _read(f"{PROC_SYS}/{key}").split())


def _total_memory() -> int:
    """Total memory of the kernel, bytes."""
    with open("/proc/meminfo") as handle:
        return int(handle.readline().split()[1]) << 10


def _set_by_parameter() -> set[str]:
    """Keys that the kernel command line has set: sysctl.KEY=VALUE, proc_do_sysctl in fs/proc/proc_sysctl.c."""
    words = _read("/proc/cmdline").split()
    return {w.partition("=")[0][7:].replace(".", "/") for w in words if w.startswith("sysctl.")}


class Limits:
    """The kernel's values at boot, and what we have set. Create it before anything is changed."""

    def __init__(self) -> None:
        self._memory_at_boot = self._memory = _total_memory()
        found = {key: _numbers(key) for key in KEYS}
        self._boot = {key: values for key, values in found.items() if values}
        self._set = {key: " ".join(map(str, values)) for key, values in self._boot.items()}
        for key in _set_by_parameter():
            self._set.pop(key, None)
        self._huge_pages_off = _read(f"{HUGE_PAGES}/enabled").strip() == "always madvise [never]"
        self._tmpfs_kib = 0  # values that we have set

    def follow(self) -> bool:
        """Adapt the limits to the current memory; returns whether that has changed since the last call."""
        memory = _total_memory()
        if memory == self._memory or "kernel/threads-max" not in self._boot:
            return False
        before = self._memory
        self._memory = memory
        counted = grown_memory(self._boot, memory - self._memory_at_boot)
        if self._huge_pages_off and counted >= HUGE_PAGES_FROM:
            self._huge_pages_off = False
            _enable_huge_pages()  # first, since it changes the watermarks
        derived = derive_limits(
            self._boot,
            memory - self._memory_at_boot,
            high_pages=parse_high_pages(_read("/proc/zoneinfo")),
            inode_bytes=int(_read("/sys/kernel/slab/inode_cache/object_size") or INODE_BYTES),
        )
        threads = int(self._set.get("kernel/threads-max", "0"))
        for key, value in derived.items():
            self._change(key, value)
        for key in CONNTRACK:
            now = " ".join(map(str, _numbers(key)))
            if now == f"{derive_conntrack(before)}":
                _write(f"{PROC_SYS}/{key}", f"{derive_conntrack(memory)}")
        if threads:
            _raise_process_limits(threads // 2, int(self._set["kernel/threads-max"]) // 2)
        self._resize_tmpfs(counted)
        log.info(f"limits adapted to {memory >> 20} MiB")
        return True

    def _change(self, key: str, value: str) -> None:
        """Only values that the kernel or we have set last."""
        now = " ".join(map(str, _numbers(key)))
        if now == self._set.get(key) != value and _write(f"{PROC_SYS}/{key}", value):
            self._set[key] = value

    def _resize_tmpfs(self, memory: int) -> None:
        """The guest's own tmpfs mounts may take half of memory: mm/shmem.c, shmem_default_max_blocks()."""
        half = memory >> 11
        for target, flags, size_kib in _tmpfs_mounts():
            if target in TMPFS and (not self._tmpfs_kib or size_kib == self._tmpfs_kib):
                _remount(target, flags, f"size={half}k,{_inodes(half)}")
            elif target.startswith(f"{SANDBOX}/"):  # has an explicit size
                _remount(target, flags, _inodes(half))
        self._tmpfs_kib = half


def _write(path: str, value: str) -> bool:
    try:
        with open(path, "w") as handle:
            handle.write(value)
    except OSError as exc:
        log.warning(f"cannot set {path} to {value}: {exc.strerror}")
        return False
    return True


def _enable_huge_pages() -> None:
    """As the kernel would have set them with more memory; the image has the configuration of this kernel."""
    mode = _read(HUGE_PAGES_BUILT).strip()
    if mode and "transparent_hugepage=" not in _read("/proc/cmdline"):
        for name, value in (*HUGE_PAGE_DEFAULTS, ("enabled", mode)):
            _write(f"{HUGE_PAGES}/{name}", value)


def _raise_process_limits(old: int, new: int) -> None:
    """RLIMIT_NPROC and RLIMIT_SIGPENDING of all processes that have inherited the values of fork_init(): half of
    threads-max."""
    import resource

    for number in (resource.RLIMIT_NPROC, resource.RLIMIT_SIGPENDING):
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            try:
                limit = resource.prlimit(int(name), number)
                changed = tuple(new if value == old else value for value in limit)
                if changed != limit:
                    resource.prlimit(int(name), number, (changed[0], changed[1]))
            except OSError:
                continue  # it has ended


def _tmpfs_mounts() -> Iterator[tuple[str, int, int]]:
    """Target, mount flags, and size in KiB where it is not the default."""
    from katapod.kernel.mount import parse_options

    for line in _read("/proc/self/mounts").splitlines():
        _, target, fstype, options, *_ = line.split()
        if fstype in ("tmpfs", "devtmpfs", "rootfs"):
            flags, data = parse_options(options.split(","))
            size = next((part[5:-1] for part in data.split(",") if part.startswith("size=")), "0")
            yield target, flags, int(size)


def _inodes(half_kib: int) -> str:
    """One per page of half of memory: shmem_default_max_inodes()."""
    return f"nr_inodes={(half_kib << 10) // PAGE}"


def _remount(target: str, flags: int, options: str) -> None:
    from katapod.kernel.mount import MS_REMOUNT, mount

    try:
        mount("none", target, None, flags | MS_REMOUNT, options)
    except OSError as exc:
        log.warning(f"cannot resize {target}: {exc.strerror}")


def open_files_limit() -> None:
    """Set the limit of open files for all our children to what engines use. Raises OSError."""
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))


def allow_open_files(wanted: int) -> None:
    """Raise fs.nr_open, the kernel's ceiling, so that processes can have a limit of `wanted` open files.

    Raises RpcError (INVALID_ARGUMENT).
    """
    if wanted > OPEN_FILES_MAX:
        raise RpcError(
            StatusCode.INVALID_ARGUMENT,
            f"cannot set the limit of open files (nofile) to {'unlimited' if wanted >= 2**63 - 1 else wanted}: "
            f"the guest's kernel allows {OPEN_FILES_MAX} at most",
        )
    ceiling = _numbers("fs/nr_open")
    if ceiling and wanted > ceiling[0]:
        _write(f"{PROC_SYS}/fs/nr_open", f"{wanted}")
