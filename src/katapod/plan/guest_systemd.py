"""The systemd flavour of the guest image, as data: which of the node's systemd goes in, and what is ours.

systemd is process 1; udevd, journald and kata-agent are its services, under kata-containers.target. Taken from
the node are the programs and units that such a boot needs and no more: no login, no bus, no network manager.
Pure. docs/adr/0022-systemd-guest.md says why it is cut this way.
"""

from collections.abc import Iterable

from msgspec import Struct

__all__ = [
    "AGENT_SERVICE",
    "AGENT_TARGET",
    "CHRONY_PROGRAM",
    "NodeFile",
    "SYSTEMD_FILES",
    "INIT",
    "UNITS",
    "groups_text",
    "systemd_links",
    "systemd_texts",
]


class NodeFile(Struct, frozen=True):
    """A file of the node, by its path on a node whose /usr is merged."""

    path: str
    required: bool = True


CHRONY_PROGRAM = "/usr/sbin/chronyd"
_UNIT_DIR = "/usr/lib/systemd/system"

UNITS = (
    "basic.target",
    "final.target",
    "halt.target",
    "local-fs-pre.target",
    "local-fs.target",
    "multi-user.target",
    "paths.target",
    "poweroff.target",
    "reboot.target",
    "shutdown.target",
    "slices.target",
    "sockets.target",
    "swap.target",
    "sysinit.target",
    "timers.target",
    "umount.target",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "systemd-halt.service",
    "systemd-journald-dev-log.socket",
    "systemd-journald.service",
    "systemd-journald.socket",
    "systemd-modules-load.service",
    "systemd-poweroff.service",
    "systemd-reboot.service",
    "systemd-sysctl.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-tmpfiles-setup.service",
    "systemd-udev-trigger.service",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
    "systemd-udevd.service",
)

_OPTIONAL_UNITS = ("kmod-static-nodes.service",)

_PROGRAMS = (
    "/usr/bin/journalctl",
    "/usr/bin/systemctl",
    "/usr/bin/systemd-tmpfiles",
    "/usr/bin/udevadm",
    "/usr/lib/systemd/systemd",
    "/usr/lib/systemd/systemd-journald",
    "/usr/lib/systemd/systemd-modules-load",
    "/usr/lib/systemd/systemd-shutdown",
    "/usr/lib/systemd/systemd-sysctl",
    "/usr/lib/systemd/systemd-udevd",
)

_OPTIONAL_PROGRAMS = (
    "/usr/bin/kmod",
    "/usr/bin/systemd-analyze",
    "/usr/bin/systemd-cgls",
    "/usr/bin/systemd-run",
    "/usr/lib/systemd/systemd-executor",  # since systemd 255
    CHRONY_PROGRAM,
)

_RULES = ("50-udev-default.rules", "80-drivers.rules", "99-systemd.rules")

SYSTEMD_FILES = (
    *(NodeFile(path) for path in _PROGRAMS),
    *(NodeFile(path, required=False) for path in _OPTIONAL_PROGRAMS),
    *(NodeFile(f"{_UNIT_DIR}/{unit}") for unit in UNITS),
    *(NodeFile(f"{_UNIT_DIR}/{unit}", required=False) for unit in _OPTIONAL_UNITS),
    *(NodeFile(f"/usr/lib/udev/rules.d/{rule}") for rule in _RULES),
)

_WANTS = (
    ("sysinit.target", "kmod-static-nodes.service"),
    ("sysinit.target", "sys-fs-fuse-connections.mount"),
    ("sysinit.target", "sys-kernel-config.mount"),
    ("sysinit.target", "systemd-journald.service"),
    ("sysinit.target", "systemd-modules-load.service"),
    ("sysinit.target", "systemd-sysctl.service"),
    ("sysinit.target", "systemd-tmpfiles-setup-dev.service"),
    ("sysinit.target", "systemd-tmpfiles-setup.service"),
    ("sysinit.target", "systemd-udev-trigger.service"),
    ("sysinit.target", "systemd-udevd.service"),
    ("sockets.target", "systemd-journald-dev-log.socket"),
    ("sockets.target", "systemd-journald.socket"),
    ("sockets.target", "systemd-udevd-control.socket"),
    ("sockets.target", "systemd-udevd-kernel.socket"),
    ("multi-user.target", "kata-agent.service"),
)

_GROUPS = {
    "disk": 6, "lp": 7, "kmem": 15, "dialout": 20, "cdrom": 24, "tape": 26, "audio": 29, "utmp": 43, "video": 44,
    "sgx": 101, "input": 102, "render": 103, "kvm": 104, "systemd-journal": 999,
}  # fmt: skip
"""The groups that systemd's own rules and services name. Source: 50-udev-default.rules, systemd-journald(8)."""

INIT = """#!/usr/bin/busybox sh
# Process 1 until systemd takes its place. The root becomes a mount that has a parent: pivot_root(2), which
# crun uses, refuses the initramfs itself; a system disk, which is read-only, gets a layer in memory. Each boot has a
# machine id of its own.
mount -t proc -o nosuid,nodev,noexec proc /proc
read -r id < /proc/sys/kernel/random/uuid
umount /proc
if mkdir -p /run/root 2>&-; then
    mount -o bind / /run/root
else
    while read -r module; do insmod "$module"; done < /etc/katapod/modules-early
    mount -t tmpfs -o nosuid,nodev,mode=0755 tmpfs /run
    mkdir /run/upper /run/work /run/root
    mount -t overlay -o lowerdir=/,upperdir=/run/upper,workdir=/run/work overlay /run/root
fi
cd /run/root
echo "${id//-/}" > etc/machine-id
mount -o move . /
exec chroot . /usr/bin/busybox sh -c 'cd /; exec -a /init /usr/lib/systemd/systemd "$@"' init "$@" --log-level=info
"""

AGENT_TARGET = """[Unit]
Description=Kata Containers Agent Target
Requires=basic.target
Requires=tmp.mount
Wants=chronyd.service
Requires=kata-agent.service
Conflicts=rescue.service rescue.target
After=basic.target rescue.service rescue.target
AllowIsolate=yes
"""

AGENT_SERVICE = """[Unit]
Description=Kata Containers Agent
Documentation=https://github.com/kata-containers/kata-containers
Wants=kata-containers.target
# As soon as its devices can be there: the host waits for its answer, and it needs neither udevd nor journald.
DefaultDependencies=no
After=tmp.mount
Conflicts=shutdown.target
Before=shutdown.target
# With the agent the sandbox ends, and with it the machine.
SuccessAction=poweroff-force
FailureAction=poweroff-force

[Service]
Type=simple
ExecStart=/usr/bin/kata-agent
Environment=KATAPOD_GUEST=systemd
StandardOutput=tty
LimitNOFILE=1048576
OOMScoreAdjust=-997
# systemd then keeps every controller enabled at the top of the tree, where crun makes the containers' cgroups.
Delegate=yes
# Before all that starts beside it, on a machine that may have one CPU. Containers have cgroups of their own.
CPUWeight=10000
# Only the agent itself: it ends its containers in order.
KillMode=process
TimeoutStopSec=5
"""

_TMP_MOUNT = """[Unit]
Description=Temporary Directory (/tmp)
DefaultDependencies=no
Conflicts=umount.target
Before=local-fs.target umount.target
After=swap.target

[Mount]
What=tmpfs
Where=/tmp
Type=tmpfs
Options=mode=1777,strictatime,nosuid,nodev
"""

_CHRONY_SERVICE = """[Unit]
Description=Clock from the host
DefaultDependencies=no
After=sysinit.target
ConditionPathExists=/dev/ptp0

[Service]
Type=simple
ExecStart=/usr/sbin/chronyd -n -u root -f /etc/chrony/chrony.conf
"""

_CHRONY_CONF = """# The host's clock through the kernel's PTP device: there is no network of the guest's own to ask.
refclock PHC /dev/ptp0 poll 3 dpoll -2 offset 0
makestep 1 -1
driftfile /run/chrony.drift
pidfile /run/chronyd.pid
bindcmdaddress /
cmdport 0
"""

_SYSTEM_CONF = """[Manager]
ShowStatus=no
# The kernel's word "debug", which enable_debug sets, means the kernel and the agent. Under emulation systemd's own
# debug messages would keep the agent from its start for half a minute.
DefaultEnvironment=SYSTEMD_LOG_LEVEL=info
DefaultTimeoutStartSec=90s
DefaultTimeoutStopSec=5s
"""

_JOURNALD_CONF = """[Journal]
Storage=volatile
RuntimeMaxUse=8M
Audit=no
"""

_TRIGGERED = ("net", "block", "virtio-ports", "misc", "mem")

_UDEV_TRIGGER = f"""# The drivers are loaded by list: coldplug only what some unit or rule is about.
[Service]
ExecStart=
ExecStart=-udevadm trigger --type=devices --action=add {" ".join(f"--subsystem-match={name}" for name in _TRIGGERED)}
"""

_TEXTS = (
    ("/etc/systemd/system/systemd-udev-trigger.service.d/katapod.conf", _UDEV_TRIGGER),
    ("/etc/systemd/journald.conf", _JOURNALD_CONF),
    ("/etc/systemd/system.conf", _SYSTEM_CONF),
    ("/usr/lib/systemd/system/kata-agent.service", AGENT_SERVICE),
    ("/usr/lib/systemd/system/kata-containers.target", AGENT_TARGET),
    ("/usr/lib/systemd/system/tmp.mount", _TMP_MOUNT),
)


def systemd_texts(present: Iterable[str], modules: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """(path, content) of the text files beside those of the agent flavour.

    `present`: paths of SYSTEMD_FILES that the node has. `modules`: names to load at boot, in order.
    """
    texts = [*_TEXTS, ("/etc/modules-load.d/katapod.conf", "".join(f"{name}\n" for name in modules))]
    if CHRONY_PROGRAM in present:
        texts += [("/etc/chrony/chrony.conf", _CHRONY_CONF), (f"{_UNIT_DIR}/chronyd.service", _CHRONY_SERVICE)]
    return tuple(texts)


def systemd_links(present: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """(path, target) of the links that put the units together."""
    have = {path.rpartition("/")[2] for path in present} | {"kata-agent.service"}
    links = [(f"{_UNIT_DIR}/{who}.wants/{unit}", f"../{unit}") for who, unit in _WANTS if unit in have]
    links.append(("/etc/systemd/system/default.target", f"{_UNIT_DIR}/kata-containers.target"))
    links += [(f"/usr/sbin/{name}", "../bin/systemctl") for name in ("halt", "poweroff", "reboot", "shutdown")]
    links.append(("/usr/sbin/init", "../lib/systemd/systemd"))
    return tuple(links)


def groups_text() -> str:
    """Lines of /etc/group."""
    return "".join(f"{name}:x:{number}:\n" for name, number in _GROUPS.items())
