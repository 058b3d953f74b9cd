"""What the walkthrough of Kata Containers 2.1 on OpenShift 4.8 shows, where a test compares ours with it.

Copied from its terminal output; names of its machine are left as they are.
"""

import re

__all__ = [
    "ENV",
    "FILTER",
    "INITRD_BYTES",
    "KERNEL_PARAMETERS",
    "MODULES",
    "MOUNTS",
    "SERVICE",
    "TARGET",
    "UNITS",
    "shape",
]

INITRD_BYTES = 19682871

ENV = """
[Meta]
  Version = "1.0.25"
[Runtime]
  Debug = false
  Trace = false
  DisableGuestSeccomp = true
  DisableNewNetNs = false
  SandboxCgroupOnly = true
  Path = "/usr/bin/kata-runtime"
  [Runtime.Version]
    OCI = "1.0.1-dev"
    [Runtime.Version.Version]
      Semver = "2.1.0"
      Major = 2
      Minor = 1
      Patch = 0
      Commit = "fa7b9408555e863d0f36f7d0640134069b0c70c8"
  [Runtime.Config]
    Path = "/usr/share/kata-containers/defaults/configuration.toml"
[Hypervisor]
  MachineType = "q35"
  Version = "QEMU emulator version 5.2.0"
  Path = "/usr/libexec/qemu-kiwi"
  BlockDeviceDriver = "virtio-scsi"
  EntropySource = "/dev/urandom"
  SharedFS = "virtio-fs"
  VirtioFSDaemon = "/usr/libexec/virtiofsd"
  Msize9p = 8192
  MemorySlots = 10
  PCIeRootPort = 0
  HotplugVFIOOnRootBus = false
  Debug = false
[Image]
  Path = ""
[Kernel]
  Path = "/usr/lib/modules/4.18.0-305.12.1.el8_4.x86_64/vmlinuz"
  Parameters = "scsi_mod.scan=none"
[Initrd]
  Path = "/var/cache/kata-containers/osbuilder-images/4.18.0-305.12.1.el8_4.x86_64/a.initrd"
[Agent]
  Debug = false
  Trace = false
  TraceMode = ""
  TraceType = ""
[Host]
  Kernel = "4.18.0-305.12.1.el8_4.x86_64"
  Architecture = "amd64"
  VMContainerCapable = true
  SupportVSocks = true
  [Host.Distro]
    Name = "Red Hat Enterprise Linux CoreOS"
    Version = "4.8"
  [Host.CPU]
    Vendor = "GenuineIntel"
    Model = "Intel(R) Xeon(R) CPU E5-2620 v2 @ 2.10GHz"
    CPUs = 24
  [Host.Memory]
    Total = 32868716
    Free = 27704960
    Available = 29880404
[Netmon]
  Path = "/usr/libexec/kata-containers/kata-netmon"
  Debug = false
  Enable = false
  [Netmon.Version]
    Semver = "2.1.0"
    Major = 2
    Minor = 1
    Patch = 0
    Commit = "<<unknown>>"
"""

NOT_IN_THE_KERNEL = "Debian's cloud kernel does not have it, and nothing here needs it"
NO_SCSI = "disks are virtio-blk: no SCSI controller"
MODULES = {
    "mcryptd": NOT_IN_THE_KERNEL,
    "virtio_blk": "",
    "virtio_console": "",
    "virtio_net": "",
    "net_failover": "",
    "sg": NO_SCSI,
    "virtio_scsi": NO_SCSI,
    "virtiofs": "",
    "failover": "",
    "vmw_vsock_virtio_transport": "",
    "vmw_vsock_virtio_transport_common": "",
    "vsock": "",
    "fuse": "",
}
"""The guest's modules, and why one is not there here."""

SUBMOUNT = "none"
"""The kernel gives no name to what virtiofsd announces as a mount of its own, as it does with a container's files."""

MOUNTS = {
    "/": ("rootfs", "rootfs"),
    "/sys": ("sysfs", "sysfs"),
    "/proc": ("proc", "proc"),
    "/dev": ("devtmpfs", "devtmpfs"),
    "/dev/shm": ("tmpfs", "tmpfs"),
    "/dev/pts": ("devpts", "devpts"),
    "/run": ("tmpfs", "tmpfs"),
    "/tmp": ("tmpfs", "tmpfs"),
    "/run/sandbox-ns/ipc": ("nsfs", "nsfs"),
    "/run/sandbox-ns/uts": ("nsfs", "nsfs"),
    "/run/kata-containers/shared/containers": ("kataShared", "virtiofs"),
    "/run/kata-containers/sandbox/shm": ("shm", "tmpfs"),
    "/etc/resolv.conf": ("tmpfs", "tmpfs"),
}
"""Target: source and type, of the guest's mounts that do not depend on the kernel's settings or the pod."""

KERNEL_PARAMETERS = """
tsc=reliable no_timer_check rcupdate.rcu_expedited=1 i8042.direct=1 i8042.dumbkbd=1 i8042.nopnp=1 i8042.noaux=1
noreplace-smp reboot=k console=hvc0 console=hvc1 cryptomgr.notests net.ifnames=0 pci=lastbus=0 quiet panic=1
nr_cpus=24 scsi_mod.scan=none agent.debug_console agent.debug_console_vport=1026
"""

UNITS = {
    r"run-kata\x2dcontainers-sandbox-shm.mount": "",
    r"run-kata\x2dcontainers-shared-containers.mount": "",
    r"run-sandbox\x2dns-ipc.mount": "",
    r"run-sandbox\x2dns-uts.mount": "",
    "-.mount": "",
    "etc-resolv.conf.mount": "",
    "sys-kernel-config.mount": "configfs is a module of Debian's kernel that nothing loads",
    "tmp.mount": "",
    "systemd-ask-password-console.path": "nobody could answer",
    "init.scope": "",
    "kata-agent.service": "",
    "kmod-static-nodes.service": "",
    "systemd-journald.service": "",
    "systemd-modules-load.service": "",
    "systemd-sysctl.service": "",
    "systemd-tmpfiles-setup-dev.service": "",
    "systemd-tmpfiles-setup.service": "",
    "systemd-udev-trigger.service": "",
    "systemd-udevd.service": "",
    "-.slice": "",
    "system.slice": "",
    "systemd-journald-dev-log.socket": "",
    "systemd-journald.socket": "",
    "systemd-udevd-control.socket": "",
    "systemd-udevd-kernel.socket": "",
    "basic.target": "",
    "kata-containers.target": "",
    "local-fs.target": "",
    "multi-user.target": "the guest boots to kata-containers.target",
    "paths.target": "",
    "slices.target": "",
    "sockets.target": "",
    "swap.target": "",
    "sysinit.target": "",
    "timers.target": "",
}
"""Units of the guest that are active, but for those of devices, and why one is not here."""

TARGET = """
[Unit]
Description=Kata Containers Agent Target
Requires=basic.target
Requires=tmp.mount
Wants=chronyd.service
Requires=kata-agent.service
Conflicts=rescue.service rescue.target
After=basic.target rescue.service rescue.target
AllowIsolate=yes
"""

SERVICE = {
    "Description=Kata Containers Agent": "",
    "Documentation=https://github.com/kata-containers/kata-containers": "",
    "Wants=kata-containers.target": "",
    "StandardOutput=tty": "",
    "Type=simple": "",
    "ExecStart=/usr/bin/kata-agent": "",
    "LimitNOFILE=1048576": "",
    "ExecStop=/bin/sync ; /usr/bin/systemctl --force poweroff": "SuccessAction ends the machine as well",
    "FailureAction=poweroff": "poweroff-force: a sandbox has nothing to stop in order",
    "OOMScoreAdjust=-997": "",
}
"""Lines of kata-agent.service, and why one is not there here."""

FILTER = """
filter parent ffff: protocol all pref 49152 u32 chain 0
filter parent ffff: protocol all pref 49152 u32 chain 0 fh 800: ht divisor 1
filter parent ffff: protocol all pref 49152 u32 chain 0 fh 800::800 order 2048 key ht 800 bkt 0 terminal flowid ??? \
not_in_hw  (rule hit 2 success 2)
  match 00000000/00000000 at 0 (success 2 )
        action order 1: mirred (Egress Redirect to device tap0_kata) stolen
        index 1 ref 1 bind 1 installed 2310 sec used 2310 sec firstused 2310 sec
        Action statistics:
        Sent 192 bytes 2 pkt (dropped 0, overlimits 0 requeues 0)
        backlog 0b 0p requeues 0
"""


def shape(text: str) -> list[str]:
    """Lines of tc's output without counters, times and indentation.

    Left out too is what depends on the kernel's settings (CONFIG_CLS_U32_PERF counts hits) and on iproute2's version
    (`flowid ???` for a class that is not set).
    """
    found = []
    for line in text.splitlines():
        line = re.sub(r"\(rule hit \d+ success \d+\)|\(success \d+ ?\)|\?\?\?", "", line)
        line = re.sub(r"index \d+", "index N", line)
        line = re.sub(r"\b(installed|used|firstused) \d+ sec\b", "", line)  # nothing is said of what has just been
        line = re.sub(r"\b\d+(?= (bytes|pkt|sec)\b)", "N", line)
        if line := " ".join(line.split()):
            found.append(line)
    return found
