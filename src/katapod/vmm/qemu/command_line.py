"""The QEMU command line as a value.

The VM starts with CPUs, memory, one PCI bridge for hot-plug, rng, vmgenid, console and agent channel;
all else is plugged over QMP (hotplug.py), before the first instruction or while the guest runs.
Names and order follow Kata's where they are visible to people.
"""

import os
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path

from msgspec import Struct, structs

from katapod.vmm.qemu.cpu_table import CPUS_MAX, KERNEL_INSTANCE, cpu_table
from katapod.vmm.spec import AGENT_PORT_NAME, CONSOLE_PORT_NAME, Accelerator, VmmOptions, VmSpec

__all__ = [
    "BRIDGES_MAX",
    "BRIDGE_SLOT",
    "FD_DIRECTORY",
    "FdSlot",
    "QemuOption",
    "QemuOptions",
    "QemuPlan",
    "pid_file",
    "qmp2_socket",
    "escape",
    "options_of",
    "plan_kernel_params",
    "plan_qemu",
    "render_qemu",
]

BRIDGE_SLOT = 2  # on pcie.0; guest PCI paths of plugged devices start with it: "02/01"; further bridges follow
BRIDGES_MAX = 5
FD_DIRECTORY = "/dev/fd"  # where QEMU finds its own descriptors as files
FIRST_PORT_CHASSIS = 16  # of PCIe root ports; bridges have the numbers below


class FdSlot(Enum):
    """Descriptors that the carrier opens and QEMU inherits; options name the slot, never a number."""

    QMP = "qmp"  # listening unix socket, already bound to VMDIR/qmp.sock: the monitor of whoever started QEMU
    QMP2 = "qmp2"  # likewise, VMDIR/qmp2.sock: the monitor of other processes, one at a time
    EXTRA_MONITOR = "extra-monitor"  # likewise, VMDIR/extra-monitor.sock: for people
    CONSOLE = "console"  # our end is read into a bounded file
    AGENT = "agent"  # one end of a socket pair
    DEBUG_CONSOLE = "debug-console"
    VSOCK = "vsock"  # /dev/vhost-vsock with its CID claimed
    MEMORY = "memory"  # a memfd of the VM's boot memory
    CPU_TABLE = "cpu-table"  # a file of QemuPlan.cpu_table
    STATE = "state"  # file of the device state of a template; named over QMP, not on the command line


MONITORS = {FdSlot.QMP: "qmp.sock", FdSlot.QMP2: "qmp2.sock", FdSlot.EXTRA_MONITOR: "extra-monitor.sock"}


class QemuOptions(VmmOptions, frozen=True):
    """What of a VM only QEMU has."""

    memory_slots: int = 0  # for DIMMs
    machine_accelerators: str = ""
    seccomp_sandbox: str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    bridges: int = 1
    root_ports: int = 0
    memory_offset_mib: int = 0  # of address space, beyond the memory that the VM may have
    iothreads: int = 0
    firmware: str = ""  # empty: QEMU's own
    extra_monitor: str = ""  # hmp, qmp, qmp-pretty
    io_uring: bool = False  # disks may use it

    def without_onlookers(self) -> "QemuOptions":
        return structs.replace(self, extra_monitor="")


DEFAULT_OPTIONS = QemuOptions()


def options_of(vm: VmSpec) -> QemuOptions:
    return vm.options if isinstance(vm.options, QemuOptions) else DEFAULT_OPTIONS


def has_cpu_table(vm: VmSpec) -> bool:
    """Whether the guest would not know of the CPUs that may be plugged in: see cpu_table.py."""
    return vm.accelerator is Accelerator.TCG and vm.vcpus < vm.max_vcpus <= CPUS_MAX


class QemuOption(Struct, frozen=True):
    """One switch. Values of a slot stand as `{slot}` in `value` until they are rendered."""

    switch: str
    value: str = ""
    slot: FdSlot | None = None

    def __str__(self) -> str:
        shown = self.value.replace("{fd}", f"<{self.slot.value}>") if self.slot else self.value
        return f"{self.switch} {shown}".rstrip()


class QemuPlan(Struct, frozen=True):
    program: str
    options: tuple[QemuOption, ...]
    vm_dir: Path
    cpu_table: bytes = b""
    io_uring: bool = False
    files: tuple[Path, ...] = ()  # of the host, that it opens by name
    uid: int = 0  # of the user that it runs as
    emulated_cpus: int = 0  # virtual CPUs that QEMU itself runs, those that may be plugged included

    @property
    def slots(self) -> tuple[FdSlot, ...]:
        return tuple(option.slot for option in self.options if option.slot is not None)

    @property
    def pid_file(self) -> Path:
        return pid_file(self.vm_dir)

    def socket_of(self, slot: FdSlot) -> Path | None:
        """Where the listening socket of a monitor lies."""
        return self.vm_dir / MONITORS[slot] if slot in MONITORS else None

    @property
    def qmp_socket(self) -> Path:
        return self.vm_dir / MONITORS[FdSlot.QMP]

    def describe(self) -> str:
        return "\n".join([self.program, *(f"  {option}" for option in self.options)])


def pid_file(vm_dir: Path) -> Path:
    """Of its number here; QEMU writes one with its number in its own PID namespace, to a directory of its own."""
    return vm_dir / "pid"


def qmp2_socket(vm_dir: Path) -> Path:
    return vm_dir / MONITORS[FdSlot.QMP2]


def escape(value: str) -> str:
    """QEMU's option parser ends a value at a comma unless the comma is doubled."""
    return value.replace(",", ",,")


def plan_qemu(vm: VmSpec) -> QemuPlan:
    """Plan one VM. The order of the options is the order in which they are explained above."""
    extra = options_of(vm)
    options = [
        QemuOption("-name", f"sandbox-{escape(vm.sandbox_id)},debug-threads=on"),
        QemuOption("-uuid", vm.uuid),
        QemuOption("-machine", _machine(vm)),
        *_accelerator(vm),
        QemuOption("-cpu", _cpu(vm)),
        QemuOption("-chardev", "socket,id=qmp,fd={fd},server=on,wait=off", FdSlot.QMP),
        QemuOption("-mon", "chardev=qmp,mode=control"),
        QemuOption("-chardev", "socket,id=qmp2,fd={fd},server=on,wait=off", FdSlot.QMP2),
        QemuOption("-mon", "chardev=qmp2,mode=control"),
        *_extra_monitor(vm),
        QemuOption("-m", _memory(vm)),
        *(_bridge(number) for number in range(extra.bridges)),
        QemuOption("-device", "virtio-serial-pci,id=serial0"),
        QemuOption("-chardev", "socket,id=charconsole0,fd={fd}", FdSlot.CONSOLE),
        QemuOption("-device", "isa-serial,chardev=charconsole0,id=console0"),
        *_agent_channel(vm),
        QemuOption("-object", f"rng-random,id=rng0,filename={escape(str(_plain(vm.entropy_source)))}"),
        QemuOption("-device", "virtio-rng-pci,rng=rng0"),
        *_balloon(vm),
        *(_root_port(number) for number in range(extra.root_ports)),
        QemuOption("-device", "vmgenid,guid=auto"),
        QemuOption("-rtc", "base=utc,driftfix=slew,clock=host"),
        QemuOption("-vga", "none"),
        QemuOption("-no-user-config"),
        QemuOption("-nodefaults"),
        QemuOption("-nographic"),
        QemuOption("-no-reboot"),
        _boot_memory(vm),
        QemuOption("-numa", "node,memdev=dimm1"),
        *_boot(vm),
        *([QemuOption("-bios", str(_plain(extra.firmware)))] if extra.firmware else []),
        *(QemuOption("-object", f"iothread,id=iothread{number}") for number in range(extra.iothreads)),
        QemuOption("-S"),
        QemuOption("-pidfile", str(pid_file(vm.vm_dir))),
        *([QemuOption("-sandbox", extra.seccomp_sandbox)] if extra.seccomp_sandbox else []),
        QemuOption("-smp", f"{vm.vcpus},cores=1,threads=1,sockets={vm.max_vcpus},maxcpus={vm.max_vcpus}"),
        *([QemuOption("-acpitable", f"file={FD_DIRECTORY}/{{fd}}", FdSlot.CPU_TABLE)] if has_cpu_table(vm) else []),
    ]
    table = cpu_table(vm.max_vcpus) if has_cpu_table(vm) else b""
    return QemuPlan(
        vm.program,
        tuple(options),
        vm.vm_dir,
        table,
        extra.io_uring,
        files=tuple(_files(vm)),
        uid=vm.uid,
        emulated_cpus=vm.max_vcpus if vm.accelerator is Accelerator.TCG else 0,
    )


def _files(vm: VmSpec) -> Iterator[Path]:
    yield _plain(vm.entropy_source)
    if vm.accelerator is Accelerator.KVM:
        yield Path("/dev/kvm")
    if not vm.restored:
        yield _plain(vm.kernel)
        yield _plain(vm.initrd)
    if options_of(vm).firmware:
        yield _plain(options_of(vm).firmware)


def _plain(path: str | Path) -> Path:
    """A name that the file can have in a jail."""
    return Path(os.path.normpath(path))


def _machine(vm: VmSpec) -> str:
    options = options_of(vm)
    # no SATA, no SMBus, no vmport, no floppy: less for the guest to probe and less to attack
    parts = ["q35", "sata=off", "smbus=off", "vmport=off"]
    return ",".join([*parts, *([options.machine_accelerators] if options.machine_accelerators else [])])


def _accelerator(vm: VmSpec) -> list[QemuOption]:
    if vm.accelerator is Accelerator.KVM:
        return [QemuOption("-accel", "kvm"), QemuOption("-global", "kvm-pit.lost_tick_policy=discard")]
    return [QemuOption("-accel", "tcg" + (f",tb-size={vm.translation_cache_mib}" if vm.translation_cache_mib else ""))]


def _cpu(vm: VmSpec) -> str:
    model = vm.remedy.model or _cpu_model(vm.accelerator)
    return ",".join(part for part in (model, vm.cpu_features, vm.remedy.features) if part)


def _cpu_model(accelerator: Accelerator) -> str:
    # la57 off: five-level page tables cost the emulated guest a level on each walk and serve no 128 TiB here.
    # erms, fsrm off: with them the guest's kernel copies by `rep movsb`, which is emulated byte by byte; by words
    # a stream through the agent is twice as fast.
    return "host" if accelerator is Accelerator.KVM else "max,la57=off,erms=off,fsrm=off"


def _bridge(number: int) -> QemuOption:
    # shpc=off: the guest sees plugged devices through ACPI, at once and without a driver module
    # reserves: firmware gives an empty bridge no windows, and what is plugged later would get no addresses
    return QemuOption(
        "-device",
        f"pci-bridge,bus=pcie.0,id=pci-bridge-{number},chassis_nr={number + 1},shpc=off,addr={BRIDGE_SLOT + number:x},"
        "io-reserve=4K,mem-reserve=2M,pref64-reserve=32M",
    )


def _root_port(number: int) -> QemuOption:
    where = f"chassis={FIRST_PORT_CHASSIS + number},slot={number}"
    return QemuOption("-device", f"pcie-root-port,id=rp{number},bus=pcie.0,{where}")


def _balloon(vm: VmSpec) -> list[QemuOption]:
    """Only for its free page reporting: what the guest frees goes back to the host."""
    if not vm.reports_free_pages or vm.preallocated or vm.hugepages:
        return []
    return [QemuOption("-device", "virtio-balloon-pci,id=balloon0,free-page-reporting=on")]


def _extra_monitor(vm: VmSpec) -> list[QemuOption]:
    options = options_of(vm)
    if not options.extra_monitor:
        return []
    mode = {"hmp": "readline", "qmp": "control", "qmp-pretty": "control,pretty=on"}[options.extra_monitor]
    return [
        QemuOption("-chardev", "socket,id=extra,fd={fd},server=on,wait=off", FdSlot.EXTRA_MONITOR),
        QemuOption("-mon", f"chardev=extra,mode={mode}"),
    ]


def _memory(vm: VmSpec) -> str:
    options = options_of(vm)
    if vm.max_mem_mib <= vm.mem_mib or options.memory_slots == 0:
        return f"{vm.mem_mib}M"
    return f"{vm.mem_mib}M,slots={options.memory_slots},maxmem={vm.max_mem_mib + options.memory_offset_mib}M"


def _boot_memory(vm: VmSpec) -> QemuOption:
    # memfd: shared with virtiofsd, and nothing stays in /dev/shm whichever process dies
    if not vm.memory_is_given:
        more = (",hugetlb=on" if vm.hugepages else "") + (",prealloc=on" if vm.hugepages or vm.preallocated else "")
        return QemuOption("-object", f"memory-backend-memfd,id=dimm1,size={vm.mem_mib}M,share=on{more}")
    backend = f"memory-backend-file,id=dimm1,size={vm.mem_mib}M,mem-path={FD_DIRECTORY}/{{fd}},share=on"
    return QemuOption("-object", backend, FdSlot.MEMORY)


def _boot(vm: VmSpec) -> list[QemuOption]:
    if vm.restored:  # the kernel is in memory already, and QEMU need not hold its file
        return [QemuOption("-incoming", "defer")]
    return [
        QemuOption("-kernel", str(_plain(vm.kernel))),
        QemuOption("-initrd", str(_plain(vm.initrd))),
        QemuOption("-append", " ".join(plan_kernel_params(vm))),
    ]


def _agent_channel(vm: VmSpec) -> list[QemuOption]:
    if vm.vsock_cid is not None:
        device = f"vhost-vsock-pci,vhostfd={{fd}},id=vsock-{vm.vsock_cid},guest-cid={vm.vsock_cid},bus=pcie.0"
        return [QemuOption("-device", device, FdSlot.VSOCK)]
    ports = [
        QemuOption("-chardev", "socket,id=charagent0,fd={fd}", FdSlot.AGENT),
        QemuOption(
            "-device",
            f"virtserialport,bus=serial0.0,nr=1,chardev=charagent0,id=agent0,name={AGENT_PORT_NAME}",
        ),
    ]
    if vm.debug_console:
        ports += [
            QemuOption("-chardev", "socket,id=chardebug0,fd={fd}", FdSlot.DEBUG_CONSOLE),
            QemuOption(
                "-device",
                f"virtserialport,bus=serial0.0,nr=2,chardev=chardebug0,id=debug0,name={CONSOLE_PORT_NAME}",
            ),
        ]
    return ports


def plan_kernel_params(vm: VmSpec) -> list[str]:
    """The guest kernel's command line, in Kata's order; later values win for the kernel."""
    params = [
        "tsc=reliable",
        "no_timer_check",
        "rcupdate.rcu_expedited=1",
        "i8042.direct=1 i8042.dumbkbd=1 i8042.nopnp=1 i8042.noaux=1",
        "noreplace-smp",
        "reboot=t",  # triple fault: ends QEMU at once, and asks no keyboard controller
        "cryptomgr.notests",
        "net.ifnames=0",
        # room for hot-plug above 4 GiB would make the kernel set 64 MiB of bounce buffers aside, which virtio
        # devices, able to reach all memory, never use
        "swiotlb=noforce",
        "console=ttyS0",
        "debug" if vm.debug else "quiet",
        "panic=1",
        f"nr_cpus={vm.max_vcpus}",
        *([f"maxcpus={vm.vcpus}", f"acpi_apic_instance={KERNEL_INSTANCE}"] if has_cpu_table(vm) else []),
        "selinux=0",
        "cgroup_no_v1=all",
        "agent.hotplug_timeout=30",  # 40 guests that start at once on two cores are slow to find their devices
        "memhp_default_state=online",  # the kernel brings plugged memory online by itself
    ]
    if vm.debug:
        params.append("agent.log=debug")
    else:
        # 10,000 files of a file system for tracing that hardly anybody mounts: 8 MiB of each guest (ADR 11)
        params.append("initcall_blacklist=tracer_init_tracefs")
    if vm.accelerator is Accelerator.TCG:
        # measured on a busy host it may be wrong by any factor, and for good
        params += [f"tsc_early_khz={vm.tsc_khz}"] if vm.tsc_khz else []
        params.append("katapod.fixed_addresses")
    if vm.debug_console:
        params += ["agent.debug_console", "agent.debug_console_vport=1026"]
    return [*params, *vm.kernel_params]


def render_qemu(plan: QemuPlan, fds: Mapping[FdSlot, int]) -> list[str]:
    """Return the argument list with slots replaced by descriptor numbers. Raises KeyError on a missing one."""
    arguments = [plan.program]
    for option in plan.options:
        arguments.append(option.switch)
        if option.value:
            arguments.append(option.value.replace("{fd}", str(fds[option.slot])) if option.slot else option.value)
    return arguments
