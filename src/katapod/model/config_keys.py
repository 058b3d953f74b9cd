"""The keys of configuration.toml that Katapod acts upon: one struct for each table of the file.

A field is the one declaration of its key, and config_declaration.py says of what it consists. The docstring is for
whoever edits a file: it becomes the key's row in docs/how-to/configuration-keys.md and its comment in
packaging/configuration.toml, which `make configuration` writes anew. There a path below docs/ becomes a link.
"""

from __future__ import annotations  # the types are evaluated where a file or a pod sets a key, not at each start

import os
from functools import cache
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from katapod.model.config_declaration import AnnotationRule, Key
from katapod.model.errors import UsageError
from katapod.model.flavour import Flavour
from katapod.model.uid_range import DEFAULT_UIDS, parse_uid_range

__all__ = [
    "SECTIONS",
    "TABLES",
    "Accelerator",
    "AgentConfig",
    "Config",
    "FactoryConfig",
    "KatapodConfig",
    "QemuConfig",
    "RuntimeConfig",
    "bare",
    "declaration",
]

Accelerator = Literal["auto", "kvm", "uml", "tcg"]


def _power_of_two(value: int) -> str:
    return f"{value} is not a power of two" if value & (value - 1) else ""


def _sector_size(value: int) -> str:
    if value and (not 512 <= value <= 65536 or value & (value - 1)):
        return f"{value} is not a power of two from 512 to 65536"
    return ""


def _uids(value: str) -> str:
    try:
        parse_uid_range(value)
    except UsageError as exc:
        return str(exc)
    return ""


def _registries(value: tuple[str, ...]) -> str:
    from katapod.model.image import is_registry

    wrong = [each for each in value if not is_registry(each)]
    return f"{wrong[0]!r} is not HOST[:PORT][/PATH]" if wrong else ""


def _patterns(value: tuple[str, ...]) -> str:
    import re

    for pattern in value:
        try:
            re.compile(pattern)
        except (re.error, OverflowError) as error:
            return f"{pattern!r} is not a regular expression: {error}"
    return ""


def _named_paths(value: tuple[str, ...]) -> str:
    names = [os.path.basename(path) for path in value]
    if bad := [path for path in value if not path.startswith("/") or not os.path.basename(path)]:
        return f"{bad[0]!r} is not an absolute path with a name at its end"
    if len(set(names)) < len(names):
        return "two paths end in the same name, the only part of them that the guest sees"
    return ""


_U32 = Meta(ge=0, le=2**32 - 1)
_U63 = Meta(ge=0, le=2**63 - 1)
_NOTHING_ELSE = Key()
_POD = Key(annotation=AnnotationRule())
"""A pod may set it."""
_POD_UNLESS_EMPTY = Key(annotation=AnnotationRule(ignore_empty=True))
_POD_IF_POSITIVE = Key(annotation=AnnotationRule(positive=True))
_PATH = Key(path=True, unset="")
_EMPTY_IS_UNSET = Key(unset="")


def _program(allowed_by: str, hash_name: str = "") -> Key:
    """A file of the host, which a pod may choose from those that are allowed."""
    return Key(path=True, unset="", annotation=AnnotationRule(allowed_by=allowed_by, hash_name=hash_name))


def _guest_file(hash_name: str) -> Key:
    """A file of which a guest is made."""
    return Key(path=True, unset="", annotation=AnnotationRule(absolute=True, hash_name=hash_name))


def _sectors(name: str) -> Key:
    return Key(unit="bytes", check=_sector_size, annotation=AnnotationRule(name=name))


class QemuConfig(Struct, frozen=True, kw_only=True):
    """[hypervisor.qemu]"""

    path: Annotated[str, _program("valid_hypervisor_paths", "hypervisor_hash")] = "/usr/bin/qemu-system-x86_64"
    """QEMU's executable."""

    kernel: Annotated[str, _guest_file("kernel_hash")] = "/var/cache/kata-containers/vmlinuz.container"
    """Guest kernel. The default is a link that `kata-runtime image build` keeps up to date."""

    initrd: Annotated[str, _guest_file("initrd_hash")] = "/var/cache/kata-containers/kata-containers-initrd.img"
    """Guest initramfs. The default is a link that `kata-runtime image build` keeps up to date."""

    image: Annotated[
        Literal[""],
        Key(
            refusal="not supported: the guest is a kernel and an initrd; use initrd",
            annotation=AnnotationRule(absolute=True),
        ),
    ] = ""
    """Guest root disk image. Not supported: it must be empty."""

    machine_type: Annotated[
        Literal["q35"],
        Key(
            unset="",
            refusal="not supported: only q35 has the PCIe hot-plug that a sandbox is built with; use q35",
            annotation=AnnotationRule(ignore_empty=True),
        ),
    ] = "q35"
    """QEMU machine type. Only q35 is supported: it has the PCIe hot-plug that a sandbox is built with."""

    machine_accelerators: Annotated[str, _POD_UNLESS_EMPTY] = ""
    """Comma-separated list appended to QEMU's `-machine`."""

    firmware: Annotated[str, _guest_file("firmware_hash")] = ""
    """Firmware image, QEMU's `-bios`. Empty: QEMU's own, which starts a guest's kernel soonest."""

    enable_annotations: Annotated[tuple[str, ...], Key(check=_patterns)] = ()
    """Regular expressions of the hypervisor annotations that a pod may set. They match anywhere in the name:
    docs/how-to/configuration.md."""

    valid_hypervisor_paths: tuple[str, ...] = ()
    """Glob patterns of the files that the annotation `path` may name."""

    valid_virtio_fs_daemon_paths: tuple[str, ...] = ()
    """Glob patterns of the files that the annotation `virtio_fs_daemon` may name."""

    valid_entropy_sources: tuple[str, ...] = ()
    """Glob patterns of the files that the annotation `entropy_source` may name."""

    kernel_params: Annotated[str, Key(annotation=AnnotationRule(combine="merge"))] = ""
    """Parameters appended to the guest kernel's command line, so that they take precedence."""

    cpu_features: Annotated[str, _POD_UNLESS_EMPTY] = "pmu=off"
    """Comma-separated list appended to QEMU's `-cpu`. A PMU in the guest costs exits and reveals events of the host.
    Under emulation `pmu=off` is left out: there is no PMU to switch off."""

    default_vcpus: Annotated[float, Key(unset=0, annotation=AnnotationRule(at_most_host_cpus=True))] = 1
    """vCPUs of a sandbox without a CPU limit. Fractions are rounded up; a negative number means all of the
    host's."""

    default_maxvcpus: Annotated[
        int, _U32, Key(annotation=AnnotationRule(name="default_max_vcpus", at_most_host_cpus=True))
    ] = 0
    """Maximum number of vCPUs of a sandbox, the ceiling of CPU hot-plug. 0: as many as the host has."""

    default_memory: Annotated[int, _U32, Key(unit="MiB", unset=0, minimum=256, annotation=AnnotationRule())] = 2048
    """Memory of a sandbox without a memory limit. The host pays only for the pages that the guest has touched."""

    memory_slots: Annotated[int, Meta(ge=0, le=256), Key(unset=0, annotation=AnnotationRule(ignore_empty=True))] = 10
    """How often memory can be plugged into a running guest."""

    default_maxmemory: Annotated[int, _U63, Key(unit="MiB")] = 0
    """Maximum memory of a sandbox, the ceiling of memory hot-plug. 0: as much as the host has."""

    memory_offset: Annotated[int, _U63, Key(unit="MiB", annotation=AnnotationRule(ignore_empty=True))] = 0
    """Address space beyond the ceiling of memory hot-plug."""

    default_bridges: Annotated[int, _U32, Key(unset=0)] = 1
    """PCI bridges for hot-plug, for 31 devices each. More than 5 means 5."""

    pcie_root_port: Annotated[int, Meta(ge=0, le=16), _POD_IF_POSITIVE] = 0
    """PCIe root ports in addition to the PCI bridges."""

    enable_mem_prealloc: Annotated[bool, _POD] = False
    """All of a guest's memory is taken from the host at its start. Such a guest boots, rather than being cloned from a
    template, with which it could share too little."""

    enable_hugepages: Annotated[bool, _POD] = False
    """Guest memory consists of the host's huge pages, all of them taken at the start. Such a guest boots, rather than
    being cloned from a template."""

    reclaim_guest_freed_memory: Annotated[bool, _POD] = True
    """Memory that the guest frees is returned to the host, by a balloon with free page reporting, unless it was taken
    at the start: docs/how-to/memory.md. On by default, unlike upstream: docs/adr/0011-memory.md."""

    block_device_aio: Annotated[Literal["threads", "native", "io_uring"], _POD] = "threads"
    """How QEMU reads and writes block devices of containers; `native` implies O_DIRECT. The default differs from
    upstream's, `io_uring`, which many kernels and sandboxes switch off."""

    block_device_cache_set: Annotated[bool, _POD] = False
    """Whether `block_device_cache_direct` and `block_device_cache_noflush` are used."""

    block_device_cache_direct: Annotated[bool, _POD] = False
    """Block devices of containers bypass the host's page cache (O_DIRECT)."""

    block_device_cache_noflush: Annotated[bool, _POD] = False
    """Flush requests for block devices of containers are ignored: a crash of the host loses data."""

    block_device_logical_sector_size: Annotated[int, _U32, _sectors("blk_logical_sector_size")] = 0
    """Logical sector size of block devices of containers, a power of two from 512 to 65536. 0: QEMU's choice."""

    block_device_physical_sector_size: Annotated[int, _U32, _sectors("blk_physical_sector_size")] = 0
    """Physical sector size of block devices of containers, a power of two from 512 to 65536 and at least the logical
    one. 0: QEMU's choice."""

    enable_iothreads: Annotated[bool, _POD] = False
    """Disks are served by a thread of their own in QEMU."""

    indep_iothreads: Annotated[int, Meta(ge=0, le=50), _POD_IF_POSITIVE] = 0
    """Number of threads that share the disks. More than 0 implies `enable_iothreads`."""

    extra_monitor_socket: Literal["", "hmp", "qmp", "qmp-pretty"] = ""
    """Protocol of a second QEMU monitor at `/run/vc/vm/ID/extra-monitor.sock`, which exists only with `enable_debug`.
    Empty: there is none."""

    shared_fs: Annotated[
        Literal["virtio-fs"],
        Key(
            unset="",
            refusal="not supported: files reach the guest by virtio-fs only (no 9p, no nydus); use virtio-fs",
            annotation=AnnotationRule(),
        ),
    ] = "virtio-fs"
    """How files reach the guest. Only virtio-fs is supported."""

    virtio_fs_daemon: Annotated[str, _program("valid_virtio_fs_daemon_paths")] = ""
    """virtiofsd's executable. Empty: the first that exists of `/usr/libexec/virtiofsd`, `/usr/lib/qemu/virtiofsd` and
    `/usr/bin/virtiofsd`."""

    virtio_fs_cache: Annotated[
        Literal["never", "metadata", "auto", "always"], Key(unset="", annotation=AnnotationRule())
    ] = "auto"
    """How the guest caches shared files. auto: it sees a change on the host after a second at most."""

    virtio_fs_extra_args: Annotated[tuple[str, ...], Key(annotation=AnnotationRule(combine="append"))] = ()
    """Further arguments of virtiofsd. Its two implementations, in C and in Rust, spell them differently."""

    virtio_fs_queue_size: Annotated[int, Meta(ge=0, le=1024), Key(unset=0, check=_power_of_two)] = 1024
    """Entries of the virtqueue, a power of two."""

    virtio_fs_cache_size: Annotated[
        Literal[0],
        Key(
            unit="MiB",
            refusal="not supported: neither QEMU's nor Rust's virtiofsd has DAX; use 0",
            annotation=AnnotationRule(),
        ),
    ] = 0
    """Size of the DAX window. Not supported: it must be 0."""

    entropy_source: Annotated[str, _program("valid_entropy_sources")] = "/dev/urandom"
    """File of the host that feeds the guest's random number generator (virtio-rng)."""

    seccompsandbox: str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    """QEMU's `-sandbox`. Empty: off. On by default, as upstream recommends but does not ship."""

    guest_hook_path: Annotated[str, Key(path=True, unset="", annotation=AnnotationRule())] = ""
    """Directory of the guest whose subdirectories `prestart`, `poststart` and `poststop` have programs to be run when
    a container starts and ends. It may be below the sandbox mounts."""

    disable_vhost_net: Annotated[bool, _POD] = False
    """QEMU moves network frames itself even where the host's kernel could (vhost-net)."""

    rx_rate_limiter_max_rate: Annotated[int, _U63, Key(unit="bit/s", annotation=AnnotationRule())] = 0
    """What each network interface may receive. 0: no limit."""

    tx_rate_limiter_max_rate: Annotated[int, _U63, Key(unit="bit/s", annotation=AnnotationRule())] = 0
    """What each network interface may send. 0: no limit."""

    enable_debug: bool = False
    """Guest kernel and agent say more on the guest's console."""


class UmlConfig(Struct, frozen=True, kw_only=True):
    """[hypervisor.uml]: User-mode Linux. Sizes, the share and the network are those of `[hypervisor.qemu]`."""

    kernel: Annotated[str, _PATH] = "/var/cache/kata-containers/vmlinuz-uml.container"
    """Guest kernel, which is a program. The default is a link that `kata-runtime image build` keeps up to date."""

    image: Annotated[str, _PATH] = "/var/cache/kata-containers/kata-containers-uml.img"
    """Guest root disk, with the modules of that kernel. The default is a link that `kata-runtime image build` keeps up
    to date."""

    kernel_params: str = ""
    """Parameters appended to the kernel's command line, so that they take precedence."""


class AgentConfig(Struct, frozen=True, kw_only=True):
    """[agent.kata]"""

    enable_debug: bool = False
    """The agent logs at level debug, on the guest's console."""

    debug_console_enabled: bool = False
    """A root shell in the guest, on a port of its own, for `kata-runtime exec`: docs/how-to/debug-console.md."""

    dial_timeout: Annotated[int, _U32, Key(unit="seconds", unset=0)] = 45
    """How long to wait for the agent after the VMM's start."""

    kernel_modules: Annotated[tuple[str, ...], Key(annotation=AnnotationRule(separator=";"))] = ()
    """Kernel modules for the agent to load, each with its parameters, as in `"overlay metacopy=on"`."""


class RuntimeConfig(Struct, frozen=True, kw_only=True):
    """[runtime]"""

    enable_debug: bool = False
    """Katapod logs at level debug, as with `--debug`."""

    disable_guest_seccomp: Annotated[bool, _POD] = False
    """Seccomp profiles are not applied to containers. Off by default, which is safer than upstream's shipped file."""

    internetworking_model: Annotated[
        Literal["tcfilter", "macvtap", "none"], Key(unset="", annotation=AnnotationRule())
    ] = "tcfilter"
    """How frames get from a pod's interfaces to the guest: docs/how-to/network.md."""

    create_container_timeout: Annotated[int, _U32, Key(unit="seconds", unset=0, annotation=AnnotationRule())] = 60
    """How long the agent may take to create a container."""

    sandbox_bind_mounts: Annotated[tuple[str, ...], Key(check=_named_paths)] = ()
    """Absolute paths of the host that every guest sees, read-only, in
    `/run/kata-containers/shared/containers/sandbox-mounts`. Their last components differ."""

    sandbox_cgroup_only: Annotated[bool, _POD] = False
    """All processes of a sandbox are in one cgroup of the host: a pod's below that of the pod, one of `run` in `/vc`.
    Off: only a pod's vCPUs are, and its other threads are in `/kata_overhead`, where no limit of a pod can kill them; a
    sandbox of `run` stays in the cgroups of who starts it: docs/how-to/memory.md."""

    static_sandbox_resource_mgmt: bool = False
    """A pod's VM gets its size once, from what the kubelet announces, and never grows."""


class FactoryConfig(Struct, frozen=True, kw_only=True):
    """[factory]"""

    enable_template: bool = True
    """Sandboxes start as clones of a guest that has booted once: docs/how-to/templates.md. On by default, unlike
    upstream, whose templates exclude virtio-fs. Clones of one template share the address layout of their kernel:
    docs/how-to/security.md."""

    template_path: Annotated[str, _PATH] = "/run/vc/vm/template"
    """Directory of the templates, best on a tmpfs: they are read at each start."""

    vm_cache_number: Annotated[int, Meta(ge=0, le=1000)] = 0
    """VMs that `kata-runtime factory init` keeps ready for the next containers: docs/how-to/pool.md. Each takes about
    the host memory of an idle sandbox. 0: none."""

    vm_cache_endpoint: Annotated[str, _PATH] = "/var/run/kata-containers/cache.sock"
    """Socket of the server that keeps VMs ready. Its protocol is Katapod's own."""


class KatapodConfig(Struct, frozen=True, kw_only=True):
    """[katapod]: settings that Kata Containers does not have."""

    accelerator: Annotated[
        Accelerator, Key(annotation=AnnotationRule(name="io.katacontainers.config.hypervisor.accelerator"))
    ] = "auto"
    """auto: KVM where this guest image is seen to boot under it; else User-mode Linux likewise, unless more is asked
    for than it has; else software emulation. kvm, uml and tcg force one of the three: docs/how-to/accelerators.md.
    `KATAPOD_ACCELERATOR` in the environment takes precedence over it, and `--accel` over both."""

    guest_flavour: Flavour = "agent"
    """What is process 1 in the guest. agent: kata-agent, which starts sooner; systemd: systemd, with kata-agent as a
    service. It moves the defaults of the guest's files: docs/how-to/guest-image.md. docs/adr/0022-systemd-guest.md
    has the figures."""

    rootfs: Literal["disk", "virtio-fs"] = "disk"
    """How an image reaches the guest. disk: as a disk with a writable layer that is thrown away; virtio-fs: in the
    shared directory. docs/adr/0009-root-file-system.md has the figures."""

    network: Annotated[str, _EMPTY_IS_UNSET] = "auto"
    """Network of a container whose caller names none: auto, none, bridge, or one of `cni_conf_dir`. auto is the
    built-in bridge where the host can have it, else none, with a warning: docs/how-to/network-run.md."""

    cni_conf_dir: Annotated[str, _PATH] = "/etc/cni/net.d"
    """Directory of further networks, a CNI `.conflist` each."""

    cni_plugin_dirs: Annotated[tuple[str, ...], _EMPTY_IS_UNSET] = ("/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni")
    """Where CNI plugins are looked for."""

    registries: Annotated[tuple[str, ...], Key(check=_registries)] = ("docker.io",)
    """Where an image is looked for that is not stored and whose name has no registry, such as debian:12: in this order,
    HOST[:PORT][/PATH] each. None: nowhere, docs/how-to/images.md."""

    spoof_check: Literal["run", "all", "none"] = "run"
    """Whose frames are held to the MAC address and the IP addresses of their interface. run: those of containers of
    `kata-runtime run`; all: those of pods too; none: docs/how-to/network-run.md."""

    jail_uids: Annotated[str, Key(check=_uids, unset="")] = str(DEFAULT_UIDS)
    """User ids, FIRST-LAST, of which each sandbox has one to itself, for its VMM. The default lies where neither
    distributions nor systemd give out any; in a user namespace they have to be mapped: docs/how-to/security.md."""

    guest_base_memory: Annotated[int, Meta(ge=64, le=65536), Key(unit="MiB")] = 192
    """What a guest needs in addition to the memory limits of its containers: docs/how-to/memory.md."""

    translation_cache: Annotated[int, Meta(ge=8, le=2048), Key(unit="MiB")] = 128
    """Bound of QEMU's translated code under software emulation. A start takes 40; docs/adr/0011-memory.md has the
    figures."""

    template_memory: Annotated[int, Meta(ge=256, le=2**20), Key(unit="MiB")] = 256
    """Memory of a template's guest, a multiple of 128. What a sandbox needs beyond is plugged into its clone."""

    template_max_age: Annotated[int, Meta(ge=1, le=525600), Key(unit="minutes")] = 1440
    """Age at which a template is made anew, and at which an unused one is removed."""

    template_max_uses: Annotated[int, Meta(ge=1, le=2**31), Key(unit="clones")] = 1000
    """Uses after which a template is made anew: at most so many kernels share an address layout."""

    console_log_kib: Annotated[int, Meta(ge=4, le=65536), Key(unit="KiB")] = 256
    """How much of a guest's console is kept. The default holds a whole boot at level debug."""


class Config(Struct, frozen=True, kw_only=True):
    qemu: QemuConfig = QemuConfig()
    uml: UmlConfig = UmlConfig()
    agent: AgentConfig = AgentConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    factory: FactoryConfig = FactoryConfig()
    katapod: KatapodConfig = KatapodConfig()


TABLES = {
    "hypervisor.qemu": "qemu",
    "hypervisor.uml": "uml",
    "agent.kata": "agent",
    "runtime": "runtime",
    "factory": "factory",
    "katapod": "katapod",
}
"""Table of the file to the field of Config."""

SECTIONS: dict[str, type[Struct]] = {table: type(getattr(Config(), field)) for table, field in TABLES.items()}


def declaration(table: str, name: str) -> tuple[Any, Key] | None:
    """The type of a key, with its bounds, and what else is declared; None: there is no such key that is acted upon."""
    section = SECTIONS.get(table)
    if section is None or name not in section.__struct_fields__:
        return None
    kind = _evaluated(section.__annotations__[name])
    return kind, next((item for item in getattr(kind, "__metadata__", ()) if isinstance(item, Key)), _NOTHING_ELSE)


@cache
def _evaluated(text: str) -> Any:
    return eval(text, globals())  # noqa: S307 - the source above, which the import at the top keeps as text


def bare(kind: Any) -> Any:
    """A type without its bounds."""
    return kind.__origin__ if hasattr(kind, "__metadata__") else kind
