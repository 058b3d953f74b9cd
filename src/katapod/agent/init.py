"""The duties of PID 1 in a guest without another init: mounts, modules, loopback, and a visible error on exit; and
those that remain with the agent if systemd is init."""

from __future__ import annotations

import os

from katapod.agent import log
from katapod.kernel.mount import MS_BIND, MS_MOVE, MS_NODEV, MS_NOEXEC, MS_NOSUID, mount
from katapod.kernel.system import load_module, power_off

__all__ = [
    "attach_console",
    "die",
    "early",
    "forget_files",
    "late",
    "load_list",
    "say",
    "under_systemd",
]

MODULES_EARLY = "/etc/katapod/modules-early"
MODULES_LATE = "/etc/katapod/modules-late"
PAGE_REPORTING_ORDER = "/sys/module/page_reporting/parameters/page_reporting_order"
CGROUP = "/sys/fs/cgroup"
DROP_CACHES = "/proc/sys/vm/drop_caches"
UEVENT_HELPER = "/sys/kernel/uevent_helper"
_SAFE = MS_NOSUID | MS_NOEXEC | MS_NODEV
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
LINK_PATHS = (("/dev/fd", "/proc/self/fd"), ("/dev/stdin", "/proc/self/fd/0"),
              ("/dev/stdout", "/proc/self/fd/1"), ("/dev/stderr", "/proc/self/fd/2"))  # fmt: skip

_on_disk = False  # whether early() has found a root disk


def say(line: str) -> None:
    """One line on the guest's console. Raises OSError."""
    fd = os.open("/dev/console", os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        os.write(fd, line.encode(errors="replace") + b"\n")
    finally:
        os.close(fd)


def die(reason: str) -> None:
    """Print the reason on the console and power off: the kernel panics if PID 1 exits."""
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
        if exc.errno != 16:  # EBUSY: mounted by the kernel or an earlier init
            raise


def _root_is_disk() -> bool:
    """Whether the root is a disk, which is read-only, and not the initramfs."""
    return bool(os.statvfs("/").f_flag & os.ST_RDONLY)


def _leave_initramfs_root() -> None:
    """Give the root mount a parent: pivot_root(2), which crun uses, rejects the initramfs."""
    os.makedirs("/run/root", exist_ok=True)
    mount("/", "/run/root", None, MS_BIND)
    _move_root("/run/root")


def _cover_disk_root() -> None:
    """Have a root that can be written to: the disk with a layer in memory."""
    mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    for name in ("upper", "work", "root"):
        os.mkdir(f"/run/{name}")
    mount("overlay", "/run/root", "overlay", 0, "lowerdir=/,upperdir=/run/upper,workdir=/run/work")
    _move_root("/run/root")


def _move_root(path: str) -> None:
    os.chdir(path)
    mount(".", "/", None, MS_MOVE)
    os.chroot(".")
    os.chdir("/")


def _stop_uevent_helper() -> None:
    """A kernel with CONFIG_UEVENT_HELPER would fork for a program that is not here whenever a device comes or goes."""
    if os.path.exists(UEVENT_HELPER):
        with open(UEVENT_HELPER, "w") as handle:
            handle.write("\n")


def attach_console() -> None:
    """Standard streams: no input, output to the console. The kernel opens them only if the initrd has /dev/console."""
    null = os.open("/dev/null", os.O_RDWR)
    console = os.open("/dev/console", os.O_WRONLY | os.O_NOCTTY)
    for number, fd in enumerate((null, console, console)):
        if fd != number:
            os.dup2(fd, number)
    for fd in {null, console} - {0, 1, 2}:
        os.close(fd)


def early() -> None:
    """What the agent channel needs. Raises OSError."""
    global _on_disk
    _on_disk = _root_is_disk()
    if _on_disk:
        load_list(MODULES_EARLY)  # overlay is among them
        _cover_disk_root()
    else:
        _leave_initramfs_root()
    _mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755")
    _mount("proc", "/proc", "proc", _SAFE)
    _mount("sysfs", "/sys", "sysfs", _SAFE)
    _stop_uevent_helper()
    attach_console()
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    if not _on_disk:
        load_list(MODULES_EARLY)


def late() -> None:
    """What the first request needs. Raises OSError."""
    from katapod.agent.room import enable_controllers

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
    enable_controllers(CGROUP)
    _loopback_up()


def forget_files() -> None:
    """Free what the page cache has of a root disk and nobody maps: modules, compiled Python, what was read ahead. It is
    a quarter of an idle guest's memory, and the host has it in its own cache. In an initramfs files are memory."""
    if _on_disk:
        with open(DROP_CACHES, "w") as handle:
            handle.write("1")


def under_systemd() -> None:
    """What systemd has not done yet: it has mounted file systems, but our channel must not wait for its modules."""
    load_list(MODULES_EARLY)
    load_list(MODULES_LATE)
    _report_all_free_pages()


def _report_all_free_pages() -> None:
    """Report single free pages to the host, not only free blocks of 2 MiB: hardly any memory of many small files is in
    such blocks. Must be called after the balloon driver is loaded, which sets the default."""
    try:
        with open(PAGE_REPORTING_ORDER, "w") as handle:
            handle.write("0")
    except OSError as exc:
        log.warning(f"cannot set {PAGE_REPORTING_ORDER}, so less free memory is returned to the host: {exc.strerror}")


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
    """Load the module files in a list, in its order; modules that are already loaded and a missing list are not errors.
    Returns the errors."""
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
