"""The guest's kernel parameters, each with what it is for.

The table knows what Katapod writes and what the runtime of the walkthrough wrote; what is not in it is said to be
unknown, and shown as it is. Source: the kernel's kernel-parameters.txt.
"""

from collections.abc import Mapping

from katapod.model.inspection import UNKNOWN_PART, OptionPart

__all__ = ["explain_kernel_parameters"]

KERNEL: Mapping[str, str] = {
    "tsc": "the time stamp counter can be relied on: no checks",
    "tsc_early_khz": "the rate of the time stamp counter, which a busy host would make the guest measure wrong",
    "no_timer_check": "no test of the timer interrupt: slow in a VM",
    "rcupdate.rcu_expedited": "shorter waits for RCU while booting",
    "i8042.direct": "no probing of a keyboard controller",
    "i8042.dumbkbd": "no probing of a keyboard controller",
    "i8042.nopnp": "no probing of a keyboard controller",
    "i8042.noaux": "no probing of a mouse",
    "noreplace-smp": "code for several CPUs stays: more may be plugged in",
    "reboot": "how to reset, which ends QEMU: t by a triple fault, k by the keyboard controller",
    "cryptomgr.notests": "no self tests of the ciphers",
    "net.ifnames": "interfaces are eth0, eth1, ...",
    "pci": "which buses are looked at",
    "swiotlb": "no bounce buffers: virtio devices reach all memory",
    "console": "where the kernel writes its messages",
    "quiet": "few messages",
    "debug": "all messages",
    "panic": "seconds from a panic to the end",
    "nr_cpus": "the most CPUs that may ever come",
    "maxcpus": "the CPUs that are started at the boot, out of those in the table",
    "acpi_apic_instance": "which table of CPUs is taken: the one by -acpitable",
    "selinux": "whether SELinux is on",
    "cgroup_no_v1": "cgroup v2 alone",
    "memhp_default_state": "memory that is plugged in is used at once",
    "initcall_blacklist": "parts of the kernel that are not started: tests, what guests do not need or must not have",
    "lpj": "how fast the CPU is, for short waits: not measured at the boot",
    "lsm": "which security modules are on",
    "dhash_entries": "the size of a hash table: that of directory entries",
    "ihash_entries": "the size of a hash table: that of inodes",
    "thash_entries": "the size of a hash table: that of TCP connections",
    "pty.legacy_count": "how many terminals of the old kind (BSD) there are",
    "scsi_mod.scan": "the agent looks for SCSI disks by itself",
    "root": "the root file system",
    "rootflags": "how it is mounted",
    "rootfstype": "its type",
    "ro": "read-only",
    "systemd.unit": "what systemd starts",
    "systemd.mask": "a unit that systemd does not start",
    "systemd.show_status": "whether systemd tells of its units",
    "systemd.unified_cgroup_hierarchy": "cgroup v2",
    "systemd.log_level": "what systemd writes into its log",
    "init": "the first program",
    "rdinit": "the first program of the initrd",
    "agent.log": "how much the agent writes into its log",
    "agent.debug_console": "the agent offers a shell in the guest (kata-runtime exec)",
    "agent.debug_console_vport": "the vsock port of that shell",
    "agent.log_vport": "the vsock port of the agent's log",
    "agent.hotplug_timeout": "seconds that the agent waits for a device",
    "katapod.fixed_addresses": "crun has the same addresses each time: it is translated once",
    "katapod.processes": "how many processes the host lets the guest have",
    "agent.container_pipe_size": "size of the pipes of containers' streams",
    "agent.unified_cgroup_hierarchy": "cgroup v2",
}


def explain_kernel_parameters(text: str) -> tuple[OptionPart, ...]:
    return tuple(
        OptionPart(word, KERNEL.get(key) or UNKNOWN_PART, key in KERNEL)
        for word in text.split()
        if (key := word.partition("=")[0])
    )
