"""The way of a forked child into its jail, until it executes the program: see plan/jail.py.

All of this runs between fork(2) and execve(2) of a process that may have had threads: no logging, no import, no lock.
"""

import errno
import os
import resource
import select
import signal
import socket
import stat
from collections.abc import Callable, Sequence

from msgspec import Struct

from katapod.host.limits import forbid_core_dumps, set_limit
from katapod.kernel.confine import (
    close_on_exec_from,
    drop_bounding_set,
    fix_addresses,
    forbid_new_privileges,
    keep_capabilities,
    pivot_root,
    set_capabilities,
    set_death_signal,
)
from katapod.kernel.mount import (
    MNT_DETACH,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    attach_tree,
    clone_tree,
    mount,
    set_tree_attributes,
    umount,
)
from katapod.kernel.process import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWUTS,
    setns,
    unshare,
)
from katapod.kernel.seccomp import add_filter
from katapod.plan.jail import Access, Bind, JailPlan, Node, Tmpfs

__all__ = ["Entry", "enter_jail"]

SCAFFOLD = "/proc"  # a directory of every host; what is there is not needed any more when the new root is put on it
ROOT_OPTIONS = "size=1m,nr_inodes=4096,mode=755"
ATTRIBUTES = {
    Access.READ: MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC,
    Access.EXECUTE: MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV,
    Access.WRITE: MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC,
    Access.DEVICE: MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC,  # which does not concern the device
}


class Entry(Struct, frozen=True):
    """`plan`, with what the parent has prepared: descriptors are the parent's, and inherited."""

    plan: JailPlan
    program: bytes  # of the seccomp filter; empty: none
    netns: int | None
    pass_fds: Sequence[int]
    parent: int  # a pidfd of the parent
    report: (
        int  # a pipe, to which the failed step is written: its name, a NUL, the number of the error, a NUL, the file
    )


def enter_jail(entry: Entry) -> None:
    """Raises OSError when it has been reported."""
    plan = entry.plan
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("join its cgroup", lambda: _join_cgroups(plan)),
        ("enter its network namespace", lambda: _enter_network(entry.netns)),
        ("make namespaces", lambda: unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP)),
        ("set its hostname", lambda: socket.sethostname(plan.hostname)),
        ("make its root directory", lambda: _make_root(plan)),
        ("close what is not for it", lambda: _keep_descriptors(entry.pass_fds)),
        ("set its limits", lambda: _set_limits(plan)),
        ("fix its addresses", fix_addresses if plan.fixed_addresses else lambda: None),
        ("change its user", lambda: _change_user(plan)),
        ("tie it to its supervisor", lambda: _die_with(entry.parent)),
        ("forbid it new privileges", forbid_new_privileges),
        ("filter its system calls", lambda: _filter_calls(entry.program)),
    )
    for name, step in steps:
        try:
            step()
        except OSError as exc:
            os.write(entry.report, f"{name}\0{exc.errno}\0{exc.filename or ''}".encode(errors="replace"))
            raise


def _join_cgroups(plan: JailPlan) -> None:
    for directory in plan.cgroups:
        fd = os.open(directory / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"0")  # who writes
        finally:
            os.close(fd)


def _enter_network(netns: int | None) -> None:
    if netns is None:
        unshare(CLONE_NEWNET)
    else:
        setns(netns, CLONE_NEWNET)


def _make_root(plan: JailPlan) -> None:
    os.umask(0o077)
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    trees = {bind: clone_tree(str(bind.source)) for bind in plan.binds}  # before anything covers them
    devices = [(node, os.stat(node.source).st_rdev) for node in plan.nodes]
    nodev = 0 if plan.nodes else MS_NODEV
    mount("tmpfs", SCAFFOLD, "tmpfs", MS_NOSUID | MS_NOEXEC | nodev, ROOT_OPTIONS)
    os.chdir(SCAFFOLD)
    placed: list[Bind | Tmpfs] = [*plan.binds, *plan.tmpfs]
    for each in sorted(placed, key=lambda each: each.target):  # a parent before what is in it
        place = each.target.removeprefix("/")
        _make_parents(place)
        if isinstance(each, Bind):
            _attach(each, trees[each], place)
        else:
            _mount_tmpfs(each, place, plan.uid)
    for node, device in devices:
        _make_node(node, device, plan.uid)
    root = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    set_tree_attributes(root, attributes=MOUNT_ATTR_RDONLY, recursive=False)
    pivot_root(".", ".")  # puts the old root over the new one
    umount(".", MNT_DETACH)
    os.chdir("/")


def _make_parents(place: str) -> None:
    at = 0
    while (at := place.find("/", at + 1)) > 0:
        try:
            os.mkdir(place[:at])
        except FileExistsError:
            continue
        os.chmod(place[:at], 0o755)  # noqa: S103  # of a read-only root


def _attach(bind: Bind, tree: int, place: str) -> None:
    if stat.S_ISDIR(os.fstat(tree).st_mode):
        os.mkdir(place)
    else:
        os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
    set_tree_attributes(tree, attributes=ATTRIBUTES[bind.access])
    attach_tree(tree, place)


def _make_node(node: Node, device: int, uid: int) -> None:
    place = node.target.removeprefix("/")
    _make_parents(place)
    os.mknod(place, stat.S_IFCHR | 0o600, device)
    os.chown(place, uid, uid)


def _mount_tmpfs(tmpfs: Tmpfs, place: str, uid: int) -> None:
    os.mkdir(place)
    flags = MS_NOSUID | MS_NODEV | (0 if tmpfs.executable else MS_NOEXEC)
    options = f"size={tmpfs.size_bytes},nr_inodes={tmpfs.files_max},mode=700,uid={uid},gid={uid}"
    if tmpfs.huge_pages:
        try:
            mount("tmpfs", place, "tmpfs", flags, f"huge=always,{options}")
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # a kernel without them, or one told to deny them
                raise
        else:
            return
    mount("tmpfs", place, "tmpfs", flags, options)


def _keep_descriptors(kept: Sequence[int]) -> None:
    close_on_exec_from(3)
    for fd in kept:
        os.set_inheritable(fd, True)


def _set_limits(plan: JailPlan) -> None:
    limits = plan.limits
    forbid_core_dumps()
    set_limit(resource.RLIMIT_NOFILE, limits.open_files)
    set_limit(resource.RLIMIT_NPROC, limits.processes)
    set_limit(resource.RLIMIT_MEMLOCK, limits.locked_bytes)
    set_limit(resource.RLIMIT_MSGQUEUE, 0)
    if limits.file_bytes is not None:
        set_limit(resource.RLIMIT_FSIZE, limits.file_bytes)


def _change_user(plan: JailPlan) -> None:
    drop_bounding_set(plan.capabilities)
    os.setgroups([])
    os.setresgid(plan.uid, plan.uid, plan.uid)
    if plan.capabilities:
        keep_capabilities()
    os.setresuid(plan.uid, plan.uid, plan.uid)
    set_capabilities(plan.capabilities)


def _die_with(parent: int) -> None:
    set_death_signal(signal.SIGKILL)
    poll = select.poll()
    poll.register(parent, select.POLLIN)
    if poll.poll(0):  # it died before: no signal comes
        os._exit(127)


def _filter_calls(program: bytes) -> None:
    if program:
        add_filter(program)
