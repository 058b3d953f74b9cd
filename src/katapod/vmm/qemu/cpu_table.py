"""The table of CPUs (MADT) that an emulated guest is given in place of QEMU's.

QEMU marks CPUs that may be plugged in later as not enabled. New kernels, such as Debian 13's 6.12.117, count those only
if they know their hypervisor (arch/x86/kernel/acpi/boot.c, acpi_is_processor_usable), and they do not know QEMU's
software emulation. Here all CPUs are enabled; the kernel starts those that are there (`maxcpus=`), and the agent the
others, once they have been plugged in.
"""

import struct

__all__ = ["CPUS_MAX", "KERNEL_INSTANCE", "cpu_table"]

CPUS_MAX = 255  # APIC ids of 8 bits, of which 255 means all
KERNEL_INSTANCE = 2  # `acpi_apic_instance=`: the kernel takes this table, after QEMU's own

LOCAL_APIC, IO_APIC, INTERRUPT_OVERRIDE, LOCAL_APIC_NMI = 0, 1, 2, 4  # types of entries: ACPI 6.5, table 5.21
LOCAL_APIC_ADDRESS, IO_APIC_ADDRESS = 0xFEE00000, 0xFEC00000
ENABLED = 1
PC_AT = 1  # the machine has the two 8259s as well
HIGH_LEVEL = 0xD  # active high, level triggered
OVERRIDES = ((0, 2, 0), (5, 5, HIGH_LEVEL), (9, 9, HIGH_LEVEL), (10, 10, HIGH_LEVEL), (11, 11, HIGH_LEVEL))
"""ISA interrupt, input of the I/O APIC, flags: as a q35 machine is wired."""


def cpu_table(cpus: int) -> bytes:
    """The table for `cpus` processors of one core each. Source: ACPI 6.5, section 5.2.12; QEMU, `-acpitable`."""
    entries = [struct.pack("<BBBBI", LOCAL_APIC, 8, number, number, ENABLED) for number in range(cpus)]
    entries.append(struct.pack("<BBBBII", IO_APIC, 12, 0, 0, IO_APIC_ADDRESS, 0))
    entries += [
        struct.pack("<BBBBIH", INTERRUPT_OVERRIDE, 10, 0, source, target, flags) for source, target, flags in OVERRIDES
    ]
    entries.append(struct.pack("<BBBHB", LOCAL_APIC_NMI, 6, 0xFF, 0, 1))
    body = struct.pack("<II", LOCAL_APIC_ADDRESS, PC_AT) + b"".join(entries)
    table = struct.pack("<4sIBB6s8sI4sI", b"APIC", 36 + len(body), 3, 0, b"KATAPO", b"KATAPOD ", 1, b"KATA", 1) + body
    return table[:9] + bytes([-sum(table) & 0xFF]) + table[10:]
