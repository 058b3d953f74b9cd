"""The duties of PID 1 in a guest that has no other init: mounts, modules, loopback, and a loud end; and
what is left of them to the agent where systemd is the init."""

from __future__ import annotations

import os

from katapod.agent import log
from katapod.kernel.mount import MS_BIND, MS_MOVE, MS_NODEV, MS_NOEXEC, MS_NOSUID, mount
from katapod.kernel.system import load_module, power_off

__all__ = ["attach_console", "die", "early", "late", "load_list", "say", "under_systemd"]

MODULES_EARLY = "/etc/katapod/modules-early"
MODULES_LATE = "/etc/katapod/modules-late"
PAGE_REPORTING_ORDER = "/sys/module/page_reporting/parameters/page_reporting_order"
CONTROLLERS = ("cpuset", "cpu", "io", "memory", "hugetlb", "pids")
CGROUP = "/sys/fs/cgroup"
_SAFE = MS_NOSUID | MS_NOEXEC | MS_NODEV
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
LINK_PATHS = (("/dev/fd", "/proc/self/fd"), ("/dev/stdin", "/proc/self/fd/0"),
              ("/dev/stdout", "/proc/self/fd/1"), ("/dev/stderr", "/proc/self/fd/2"))  # fmt: skip


def say(line: str) -> None:
    """One line on the guest's console. Raises OSError."""
    fd = os.open("/dev/console", os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        os.write(fd, line.encode(errors="replace") + b"\n")
    finally:
        os.close(fd)


def die(reason: str) -> None:
    """Say why on the console and switch the machine off: a PID 1 that ends makes the kernel panic."""
    try:
        say(f"kata-agent: fatal: {reason}")
        os.sync()
    finally:
        power_off()


def _mount(source: str, target: str, fstype: str, flags: int = 0, data: str | None = None) -> None:
    os.makedirs(target, exist_ok=True)
    try:
        mount(source, target, fstype, flags, data)
    except OSError as exc:
        if exc.errno != 16:  # EBUSY: the kernel or an earlier init has mounted it
            raise


def _leave_initramfs_root() -> None:
    """Make the root a mount that has a parent: pivot_root(2), which crun uses, refuses the initramfs."""
    os.makedirs("/run/root", exist_ok=True)
    mount("/", "/run/root", None, MS_BIND)
    os.chdir("/run/root")
    mount(".", "/", None, MS_MOVE)
    os.chroot(".")
    os.chdir("/")


def attach_console() -> None:
    """Standard streams: input from nowhere, output to the console. The kernel opens them only if the
    initrd has a /dev/console."""
    null = os.open("/dev/null", os.O_RDWR)
    console = os.open("/dev/console", os.O_WRONLY | os.O_NOCTTY)
    for number, fd in enumerate((null, console, console)):
        if fd != number:
            os.dup2(fd, number)
    for fd in {null, console} - {0, 1, 2}:
        os.close(fd)


def early() -> None:
    """What the agent channel needs. Raises OSError."""
    _leave_initramfs_root()
    _mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755")
    _mount("proc", "/proc", "proc", _SAFE)
    _mount("sysfs", "/sys", "sysfs", _SAFE)
    attach_console()
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    load_list(MODULES_EARLY)


def late() -> None:
    """What the first request needs. Raises OSError."""
    load_list(MODULES_LATE)
    _report_all_free_pages()
    _mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666")
    _mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    _mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    _mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    for path, target in LINK_PATHS:
        if not os.path.lexists(path):
            os.symlink(target, path)
    os.makedirs("/var", exist_ok=True)
    if not os.path.lexists("/var/run"):
        os.symlink("/run", "/var/run")
    _mount("cgroup2", CGROUP, "cgroup2", _SAFE)
    _enable_controllers()
    _loopback_up()


def under_systemd() -> None:
    """What systemd has not done by now: it has mounted, but our channel is not to wait for its modules."""
    load_list(MODULES_EARLY)
    load_list(MODULES_LATE)
    _report_all_free_pages()


def _report_all_free_pages() -> None:
    """Give single free pages back to the host too, not only free blocks of 2 MiB: of the memory of many small files
    hardly any is in such blocks. The balloon's driver sets the kernel's default when it is loaded."""
    try:
        with open(PAGE_REPORTING_ORDER, "w") as handle:
            handle.write("0")
    except OSError as exc:
        log.warning(f"the guest keeps more of what it frees: cannot set {PAGE_REPORTING_ORDER}: {exc.strerror}")


def _enable_controllers() -> None:
    with open(f"{CGROUP}/cgroup.controllers") as handle:
        have = handle.read().split()
    for name in CONTROLLERS:
        if name in have:
            with open(f"{CGROUP}/cgroup.subtree_control", "w") as handle:
                handle.write(f"+{name}")


def _loopback_up() -> None:
    import _socket
    import fcntl
    import struct

    probe = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:
        request = struct.pack("16sH22x", b"lo", 0)
        flags = struct.unpack("16sH22x", fcntl.ioctl(probe.fileno(), SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(probe.fileno(), SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | IFF_UP))
    finally:
        probe.close()


def load_list(path: str) -> list[str]:
    """Load the module files that a list names, in its order; those there already are fine, and so is a
    list that is not there. Returns what went wrong."""
    failures = []
    try:
        with open(path) as handle:
            names = handle.read().split()
    except FileNotFoundError:
        return []
    for name in names:
        try:
            load_module(name)
        except FileExistsError:
            continue
        except OSError as exc:
            failures.append(f"cannot load {name}: {exc.strerror}")
            log.warning(failures[-1])
    return failures
