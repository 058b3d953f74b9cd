"""The table of CPUs is QEMU's own but for its owner and its flags."""

from katapod.vmm.qemu.cpu_table import cpu_table

OF_QEMU = bytes.fromhex(
    "41504943 80000000 03 76 424f43485320 4258504320202020 01000000 42585043 01000000 0000e0fe 01000000"
    "0008 0000 01000000"  # there from the start
    "0008 0101 00000000"  # may be plugged in
    "010c 0000 0000c0fe 00000000"
    "020a 0000 02000000 0000 020a 0005 05000000 0d00 020a 0009 09000000 0d00 020a 000a 0a000000 0d00"
    "020a 000b 0b000000 0d00 0406 ff0000 01"
)
"""/sys/firmware/acpi/tables/APIC of a guest with `-smp 1,sockets=2,maxcpus=2`, by QEMU 10.0."""


def test_all_cpus_are_enabled_and_all_else_is_as_qemu_has_it() -> None:
    table = cpu_table(2)
    assert len(table) == len(OF_QEMU)
    assert (table[:9], sum(table) % 256) == (OF_QEMU[:9], 0)
    differs = [index for index in range(36, len(table)) if table[index] != OF_QEMU[index]]
    assert differs == [56]  # flags of the second processor
    assert (OF_QEMU[56], table[56]) == (0, 1)


def test_one_entry_for_each_cpu() -> None:
    table = cpu_table(255)
    assert int.from_bytes(table[4:8], "little") == len(table) == len(cpu_table(1)) + 254 * 8
    assert [table[44 + 8 * number + 3] for number in range(255)] == list(range(255))
