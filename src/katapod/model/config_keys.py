"""The keys of configuration.toml that Katapod acts upon: one struct for each table of the file.

The type is what the file may hold; the docstring gives unit, default and reason. config.py reads the
file; config_refused.py has the keys that are known and not acted upon.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from katapod.model.flavour import Flavour

__all__ = ["Accelerator", "AgentConfig", "Config", "FactoryConfig", "KatapodConfig", "QemuConfig", "RuntimeConfig"]

_U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
_U63 = Annotated[int, Meta(ge=0, le=2**63 - 1)]

Accelerator = Literal["auto", "kvm", "tcg"]
SpoofCheck = Literal["run", "all", "none"]
RootfsKind = Literal["disk", "virtio-fs"]


class QemuConfig(Struct, frozen=True, kw_only=True):
    """[hypervisor.qemu]"""

    path: str = "/usr/bin/qemu-system-x86_64"
    """QEMU's program. Default: where Debian and Fedora install it."""

    kernel: str = "/var/cache/kata-containers/vmlinuz.container"
    """Guest kernel. Default: the link that `kata-runtime image build` keeps up to date."""

    initrd: str = "/var/cache/kata-containers/kata-containers-initrd.img"
    """Guest initramfs. Default: as for `kernel`."""

    image: Literal[""] = ""
    """Guest root disk image. Images are not supported; an empty string means no image, as upstream."""

    machine_type: Literal["q35"] = "q35"
    """QEMU machine. Only q35 has the PCIe hot-plug that a sandbox is built with."""

    machine_accelerators: str = ""
    """Comma list appended to -machine. Default none."""

    firmware: str = ""
    """Firmware image, QEMU's -bios. Default: QEMU's own, which starts a guest's kernel soonest."""

    enable_annotations: tuple[str, ...] = ()
    """Regular expressions of the hypervisor annotations that a pod may set, matched anywhere in the name. Default: a
    pod may set none, as upstream without the key."""

    valid_hypervisor_paths: tuple[str, ...] = ()
    """Globs of what the annotation `path` may name. Default: nothing."""

    valid_virtio_fs_daemon_paths: tuple[str, ...] = ()
    """Globs of what the annotation `virtio_fs_daemon` may name. Default: nothing."""

    valid_entropy_sources: tuple[str, ...] = ()
    """Globs of what the annotation `entropy_source` may name. Default: nothing."""

    kernel_params: str = ""
    """Appended to the kernel's command line, so that they win. Default: none."""

    cpu_features: str = "pmu=off"
    """Comma list appended to -cpu. Default as upstream: a guest PMU costs exits and leaks host events."""

    default_vcpus: float = 1
    """vCPUs of a sandbox without CPU limits; fractions are rounded up. Default 1. A negative number means
    all CPUs of the host, 0 the default."""

    default_maxvcpus: _U32 = 0
    """Hot-plug ceiling. Default 0 = CPUs of the host."""

    default_memory: _U32 = 2048
    """MiB of a sandbox without memory limits. Default as upstream; the host pays only for touched pages."""

    memory_slots: Annotated[int, Meta(ge=0, le=256)] = 10
    """Number of memory hot-plug operations possible. Default as upstream; 256 is QEMU's limit."""

    default_maxmemory: _U63 = 0
    """MiB, ceiling of memory hot-plug. Default 0 = memory of the host."""

    memory_offset: _U63 = 0
    """MiB of address space beyond the ceiling of memory hot-plug. Default 0, as upstream."""

    default_bridges: _U32 = 1
    """PCI bridges for hot-plug, 31 devices each. Default 1; 0 means the default, more than 5 means 5, as upstream."""

    pcie_root_port: Annotated[int, Meta(ge=0, le=16)] = 0
    """PCIe root ports that the machine has beside its bridges. Default none."""

    enable_mem_prealloc: bool = False
    """All of a guest's memory is taken from the host at its start. Default off: the host pays for what is touched.
    Such guests boot: a template's clone would share nothing that is worth it."""

    enable_hugepages: bool = False
    """Guest memory is of the host's huge pages, all of it from the start. Default off. Such guests boot."""

    reclaim_guest_freed_memory: bool = True
    """Memory that the guest frees goes back to the host (a balloon with free page reporting). Default on, unlike
    upstream: docs/adr/0011-memory.md. Without effect for memory that is taken at the start."""

    block_device_aio: Literal["threads", "native", "io_uring"] = "threads"
    """How QEMU reads and writes block devices of containers. Default threads, unlike upstream: kernels and sandboxes
    in which io_uring is off are common."""

    block_device_cache_set: bool = False
    """Whether the two keys below are used. Default off, as upstream."""

    block_device_cache_direct: bool = False
    """Block devices of containers pass by the host's page cache (O_DIRECT). Default off."""

    block_device_cache_noflush: bool = False
    """What the guest wants to be flushed to block devices of containers is not. Default off: it loses data."""

    block_device_logical_sector_size: _U32 = 0
    """Bytes of a logical sector of block devices of containers, a power of two from 512 to 65536. Default 0: QEMU's."""

    block_device_physical_sector_size: _U32 = 0
    """The same for physical sectors, at least the logical one. Default 0: QEMU's."""

    enable_iothreads: bool = False
    """A thread of QEMU's own serves the disks. Default off, as upstream."""

    indep_iothreads: Annotated[int, Meta(ge=0, le=50)] = 0
    """Threads that share the disks; more than 0 implies enable_iothreads. Default 0, as upstream."""

    extra_monitor_socket: Literal["", "hmp", "qmp", "qmp-pretty"] = ""
    """A second monitor of QEMU at extra-monitor.sock in the VM's directory, with enable_debug only. Default none."""

    shared_fs: Literal["virtio-fs"] = "virtio-fs"
    """How files reach the guest. 9p lost its handler in upstream's agent; nydus is not supported."""

    virtio_fs_daemon: str = ""
    """virtiofsd's program. Default: the first of VIRTIOFSD_PATHS that exists."""

    virtio_fs_cache: Literal["never", "metadata", "auto", "always"] = "auto"
    """How the guest caches. Default auto: changes on the host become visible after one second."""

    virtio_fs_extra_args: tuple[str, ...] = ()
    """Further arguments of virtiofsd. Default none: its two programs spell them differently."""

    virtio_fs_queue_size: Annotated[int, Meta(ge=0, le=1024)] = 1024
    """Entries of the virtqueue, a power of two. Default as upstream, which is QEMU's limit; 0 means it."""

    virtio_fs_cache_size: Literal[0] = 0
    """MiB of the DAX window. Neither QEMU 7 nor virtiofsd's releases have DAX, so only 0 (off)."""

    entropy_source: str = "/dev/urandom"
    """Host file that feeds the guest's virtio-rng. Default: never blocks, and is as good as /dev/random."""

    seccompsandbox: str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    """QEMU's -sandbox. Default: what upstream recommends (its default is off); an empty string is off."""

    guest_hook_path: str = ""
    """Directory of the guest image with programs in prestart, poststart and poststop, which each container's start
    and end run. Default none."""

    disable_vhost_net: bool = False
    """Do not let the host's kernel move frames (vhost-net) even if it could. Default off, as upstream."""

    rx_rate_limiter_max_rate: _U63 = 0
    """bit/s that each interface of a sandbox may receive. Default 0: no limit."""

    tx_rate_limiter_max_rate: _U63 = 0
    """bit/s that each interface of a sandbox may send. Default 0: no limit."""

    enable_debug: bool = False
    """The guest's kernel and agent say more on its console. Default off."""


class AgentConfig(Struct, frozen=True, kw_only=True):
    """[agent.kata]"""

    enable_debug: bool = False
    """Guest agent logs at level debug. Default off."""

    debug_console_enabled: bool = False
    """A root shell inside the guest on a port of its own. Default off: it bypasses the container."""

    dial_timeout: _U32 = 45
    """Seconds to wait for the agent after QEMU's start. Default as upstream's file; 0 means the default."""

    kernel_modules: tuple[str, ...] = ()
    """Modules for the agent to load, each "name param=value ...". Default none."""


class RuntimeConfig(Struct, frozen=True, kw_only=True):
    """[runtime]"""

    enable_debug: bool = False
    """Katapod logs at level debug. Default off."""

    disable_guest_seccomp: bool = False
    """Do not apply seccomp profiles to containers. Default off, safer than upstream's shipped file."""

    internetworking_model: Literal["tcfilter", "macvtap", "none"] = "tcfilter"
    """How frames get from the pod's interfaces to the guest. Default as upstream; docs/how-to/network.md."""

    create_container_timeout: _U32 = 60
    """Seconds for the agent to create a container. Default as upstream's file; 0 means the default."""

    sandbox_bind_mounts: tuple[str, ...] = ()
    """Paths of the host that every guest sees, read-only, below sandbox-mounts in the shared directory; their last
    components differ. Default none."""

    sandbox_cgroup_only: bool = False
    """All of a pod's sandbox is in one cgroup of the host below the pod's. Default off, as upstream: its processes are
    below /kata_overhead, where no limit of a pod can kill them, and only its vCPUs are in the pod's."""

    static_sandbox_resource_mgmt: bool = False
    """A pod's VM gets its size once, from what the kubelet announces, and never grows. Default off, as upstream."""


class FactoryConfig(Struct, frozen=True, kw_only=True):
    """[factory]"""

    enable_template: bool = True
    """Start sandboxes as clones of a guest that has booted. Default on, unlike upstream, whose templates exclude
    virtio-fs. Clones of one template share the address layout of their kernel: docs/how-to/security.md."""

    template_path: str = "/run/vc/vm/template"
    """Directory of the templates, best on a tmpfs: they are read at each start. Default as upstream."""

    vm_cache_number: Annotated[int, Meta(ge=0, le=1000)] = 0
    """Machines that `kata-runtime factory init` keeps ready for the next containers. Default 0: no pool, as
    upstream. Each takes host memory, about that of an idle sandbox: docs/how-to/pool.md."""

    vm_cache_endpoint: str = "/var/run/kata-containers/cache.sock"
    """Socket of the pool's server. Default as upstream; the protocol on it is Katapod's own."""


class KatapodConfig(Struct, frozen=True, kw_only=True):
    """[katapod]: settings that upstream does not have."""

    accelerator: Accelerator = "auto"
    """auto = KVM where a guest is seen to boot under it, else software emulation. Default auto."""

    guest_flavour: Flavour = "agent"
    """agent = kata-agent is the guest's init, systemd = systemd is: it moves the defaults of kernel and initrd to
    that flavour's links. Default agent: it starts sooner. docs/adr/0022-systemd-guest.md has the figures."""

    rootfs: RootfsKind = "disk"
    """disk = an image of the store is a disk of the VM, virtio-fs = it is in the shared directory. Default disk:
    docs/adr/0009-root-file-system.md has the figures."""

    network: str = "auto"
    """Network of a container whose caller names none. auto = bridge, the built-in one, where the host can have it,
    else none, with one warning: docs/adr/0013-networks-for-run.md."""

    cni_conf_dir: str = "/etc/cni/net.d"
    """Directory of further networks, a .conflist each. Default as containerd and Podman."""

    cni_plugin_dirs: tuple[str, ...] = ("/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni")
    """Where CNI's plugins are looked for. Default: upstream's archive, Debian, RHEL."""

    spoof_check: SpoofCheck = "run"
    """Whose frames are held to the MAC address and addresses of their interface: run = those of containers of
    kata-runtime run, all = those of pods too, none. Default run: pods may have reasons, and CNI's plugins rules."""

    guest_base_memory: Annotated[int, Meta(ge=64, le=65536)] = 192
    """MiB that a guest needs beside its containers' memory limits; sizing.py explains the default."""

    translation_cache: Annotated[int, Meta(ge=8, le=2048)] = 128
    """MiB that QEMU may use for translated code under software emulation. Default 128: a start takes 40, a compiler
    is 1.1 times as slow as without a bound, and 1.4 times with 64; docs/adr/0011-memory.md has the figures."""

    template_memory: Annotated[int, Meta(ge=256, le=2**20)] = 256
    """MiB of a template's guest, a multiple of 128; what a sandbox needs beyond is plugged into its clone."""

    template_max_age: Annotated[int, Meta(ge=1, le=525600)] = 1440
    """Minutes after which a template is made anew, and after which an unused one goes. Default a day."""

    template_max_uses: Annotated[int, Meta(ge=1, le=2**31)] = 1000
    """Clones after which a template is made anew: so many kernels at most share an address layout."""

    console_log_kib: Annotated[int, Meta(ge=4, le=65536)] = 256
    """KiB kept of a guest's console. Default: a whole boot at level debug; a guest cannot fill the disk."""


class Config(Struct, frozen=True, kw_only=True):
    qemu: QemuConfig = QemuConfig()
    agent: AgentConfig = AgentConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    factory: FactoryConfig = FactoryConfig()
    katapod: KatapodConfig = KatapodConfig()
