"""QEMU's command line, piece by piece, each with what it is for.

The tables know what Katapod writes and what the runtime of the walkthrough wrote; what is not in them is said to be
unknown, and shown as it is. Source: qemu(1), `qemu -device DRIVER,help`.
"""

from collections.abc import Mapping, Sequence

from katapod.model.inspection import UNKNOWN_PART, OptionPart

__all__ = ["explain_command_line", "word_after"]

CPU_FEATURE = "a feature of the processor, on or off"

FLAGS = frozenset({"-S", "-no-user-config", "-nodefaults", "-nographic", "-no-reboot", "-daemonize", "-no-shutdown"})

SWITCHES: Mapping[str, str] = {
    "-name": "the VM's name, by which ps tells sandboxes apart; debug-threads names QEMU's threads too",
    "-uuid": "an identity of the machine, which the guest can read in its SMBIOS tables",
    "-machine": "the board: q35 is a PC with PCI Express",
    "-accel": "who executes the guest's instructions: the processor by KVM, or QEMU itself (tcg)",
    "-global": "a property for all devices of a kind",
    "-cpu": "the processor model and its features",
    "-chardev": "a stream of bytes on the host that a device or the monitor uses",
    "-mon": "the monitor on one of these streams; mode=control is QMP, for programs",
    "-qmp": "the monitor for programs, QMP, on a socket",
    "-monitor": "the monitor for people",
    "-m": "memory at the start, slots for more, and the most it may grow to",
    "-device": "a device of the guest",
    "-object": "something of QEMU's own that devices use",
    "-netdev": "the host's side of a network device",
    "-drive": "a disk, and the file behind it",
    "-fsdev": "a directory of the host for 9p",
    "-rtc": "the guest's clock",
    "-vga": "no graphics card",
    "-no-user-config": "no configuration file of the host changes this VM",
    "-nodefaults": "no device that is not named here",
    "-nographic": "no window",
    "-no-reboot": "a guest that reboots or panics ends QEMU: a sandbox runs once",
    "-no-shutdown": "QEMU stays when the guest ends",
    "-daemonize": "QEMU leaves its parent; here it stays its supervisor's child, and dies with it",
    "-numa": "which memory belongs to which NUMA node: one node with all of it",
    "-kernel": "the guest's kernel, loaded without a boot loader",
    "-initrd": "the guest's root file system, unpacked into memory",
    "-append": "the kernel's parameters, explained below",
    "-incoming": "the state of the VM is loaded from a template, by QMP, in place of a boot",
    "-S": "stopped before the first instruction, until the devices are plugged in by QMP",
    "-pidfile": "where QEMU writes its process number",
    "-sandbox": "seccomp: system calls that QEMU itself must not make, should a guest break out into it",
    "-smp": "virtual CPUs at the start, and the most that may be plugged in",
    "-acpitable": "a table of all CPUs that may come: Linux under software emulation leaves those out of QEMU's own",
    "-bios": "the firmware",
    "-serial": "a serial port of the guest",
    "-nic": "a network device with its host's side",
}

DEVICES: Mapping[str, str] = {
    "pci-bridge": "the bridge that hot-plugged devices sit behind",
    "pcie-root-port": "a port for hot-plugged PCI Express devices",
    "pcie-pci-bridge": "a bridge from PCI Express to PCI",
    "virtio-serial-pci": "carries serial ports by virtio: the agent channel where there is no vsock, consoles",
    "virtconsole": "the guest's console by virtio",
    "virtserialport": "a named port to a program in the guest",
    "isa-serial": "the guest's console: an emulated serial port, there from the first instruction",
    "virtio-scsi-pci": "a SCSI controller for disks that are plugged in",
    "virtio-blk-pci": "a disk",
    "scsi-hd": "a disk at the SCSI controller",
    "virtio-rng-pci": "gives the guest's kernel random numbers of the host",
    "virtio-balloon-pci": "memory that the guest frees goes back to the host (free page reporting)",
    "vhost-vsock-pci": "a socket between host and guest: the agent channel",
    "vhost-user-fs-pci": "the shared directory, by virtio-fs: virtiofsd serves it",
    "virtio-9p-pci": "a shared directory by 9p",
    "virtio-net-pci": "a network card",
    "vmgenid": "tells the guest's kernel that it is a copy, so that it renews its random numbers",
    "vfio-pci": "a device of the host, given away",
    "nvdimm": "the root file system as persistent memory",
    "pc-dimm": "more memory",
    "intel-iommu": "an IOMMU",
    "pvpanic": "tells QEMU when the guest's kernel panics",
}

OBJECTS: Mapping[str, str] = {
    "rng-random": "random numbers from a file of the host",
    "memory-backend-memfd": "the guest's memory, shared with virtiofsd; no file has its name",
    "memory-backend-file": "the guest's memory in a file, or in a file that was handed over; shared with virtiofsd",
    "memory-backend-ram": "the guest's memory",
    "iothread": "a thread for disks",
}

CHARDEVS: Mapping[str, str] = {"socket": "a socket", "file": "a file", "pipe": "a pipe", "stdio": "QEMU's own streams"}

PROPERTIES: Mapping[str, str] = {
    "accel": "who executes the guest's instructions",
    "addr": "its slot on the bus",
    "base": "the clock begins with this time zone",
    "bus": "the bus that it sits on",
    "chardev": "the stream that it uses",
    "chassis_nr": "the bridge's number for hot-plug",
    "clock": "which clock of the host it follows",
    "cores": "cores of a processor",
    "debug-threads": "QEMU's threads have names",
    "disable-modern": "without virtio 1.0; for hosts that are VMs themselves",
    "disable-legacy": "virtio 1.0 only: no I/O ports",
    "driftfix": "lost timer ticks are made up for, slowly",
    "driver": "the kind of device",
    "elevateprivileges": "seccomp: no setuid and the like",
    "fd": "the descriptor that QEMU was started with",
    "fds": "descriptors of the tap's queues",
    "file": "a file that was handed over",
    "filename": "the file",
    "format": "the format of the file",
    "free-page-reporting": "freed memory is given back",
    "guest-cid": "the guest's address on vsock",
    "guid": "the value; auto: a new one",
    "id": "its name here and in QMP",
    "io-reserve": "room for I/O ports behind the bridge",
    "kernel_irqchip": "interrupt controllers in KVM",
    "kvm-pit.lost_tick_policy": "what happens to timer ticks that the guest missed",
    "mac": "its hardware address",
    "maxcpus": "the most virtual CPUs",
    "maxmem": "the most memory",
    "mem-path": "where the memory lies",
    "mem-reserve": "room for memory windows behind the bridge",
    "memdev": "the memory it gets",
    "mode": "who speaks there",
    "mq": "several queues",
    "name": "the port's name in the guest",
    "netdev": "its host's side",
    "nr": "the number of the port",
    "obsolete": "seccomp: no obsolete system calls",
    "path": "the socket's path",
    "pref64-reserve": "room for prefetchable memory behind the bridge",
    "queue-size": "entries of a queue",
    "resourcecontrol": "seccomp: no change of its own limits",
    "rng": "where the numbers come from",
    "sata": "no SATA controller: less to attack",
    "server": "QEMU listens, in place of connecting",
    "share": "the memory can be shared with virtiofsd",
    "shpc": "hot-plug through a controller of the bridge; off: through ACPI, without a driver",
    "size": "how much",
    "slots": "how many times memory can be added",
    "smbus": "no SMBus controller",
    "sockets": "processors",
    "spawn": "seccomp: QEMU starts no program",
    "tag": "the name that the guest mounts it by",
    "tb-size": "MiB of translated code that tcg keeps at most",
    "thread": "single: the virtual CPUs take turns on one thread, since this QEMU is older than 8.1",
    "threads": "threads of a core",
    "vectors": "interrupts",
    "vhost": "packets are carried by the host's kernel",
    "vhostfd": "the descriptor of /dev/vhost-vsock",
    "vhostfds": "descriptors of /dev/vhost-net",
    "vmport": "no VMware port",
    "wait": "QEMU does not wait for somebody to connect",
}


def word_after(words: Sequence[str], switch: str) -> str:
    """The value of a switch, the first if there are several; empty if it is not there."""
    for index, word in enumerate(words[:-1]):
        if word == switch:
            return words[index + 1]
    return ""


def explain_command_line(words: Sequence[str]) -> tuple[OptionPart, ...]:
    """One part for the program, then one for each switch with its value."""
    if not words:
        return ()
    parts = [OptionPart(words[0], "the program: a process of this host, for one sandbox")]
    index = 1
    while index < len(words):
        switch = words[index]
        index += 1
        name = "-" + switch.lstrip("-")  # both forms mean the same
        value = ""
        takes_value = name not in FLAGS and index < len(words)
        if takes_value and (name in SWITCHES or not words[index].startswith("-")):
            value = words[index]
            index += 1
        parts.append(_option(switch, name, value))
    return tuple(parts)


def _option(switch: str, name: str, value: str) -> OptionPart:
    meaning, known = SWITCHES.get(name, UNKNOWN_PART), name in SWITCHES
    part = f"{switch} {value}".rstrip()
    if not known or not value or name in ("-append", "-kernel", "-initrd", "-pidfile", "-uuid"):
        return OptionPart(part, meaning, known)
    pieces = _split(value)
    head, rest = pieces[0], pieces[1:]
    kinds = {"-device": DEVICES, "-object": OBJECTS, "-chardev": CHARDEVS}.get(name)
    if kinds is not None:
        kind = head.removeprefix("driver=")
        if kind in kinds:
            meaning = f"{meaning}: {kinds[kind]}"
        else:
            known, meaning = False, f"{meaning}; {kind}: {UNKNOWN_PART}"
        return OptionPart(part, meaning, known, tuple(_property(piece) for piece in rest))
    if name == "-cpu":
        return OptionPart(part, meaning, known, tuple(OptionPart(piece, CPU_FEATURE) for piece in rest))
    details = tuple(_property(piece) for piece in pieces if "=" in piece)
    return OptionPart(part, meaning, known, details)


def _property(piece: str) -> OptionPart:
    key = piece.partition("=")[0]
    return OptionPart(piece, PROPERTIES.get(key) or UNKNOWN_PART, bool(PROPERTIES.get(key)))


def _split(value: str) -> list[str]:
    """At single commas: a doubled one is a comma of the value."""
    mark = "\0"
    return [piece.replace(mark, ",") for piece in value.replace(",,", mark).split(",")]
