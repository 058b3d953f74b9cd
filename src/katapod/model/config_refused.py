"""The keys of configuration.toml that Katapod knows but does not act upon, each with the reason.

The keys that it acts upon are the fields of the structs in config_keys.py. Together they are every key of
upstream's QEMU configuration file, so that any other key is a mistake that can be pointed out.

A key of this table is accepted while it has a value that asks for nothing: upstream's default, or a value that
says what Katapod does anyway. Any other value is refused: docs/adr/0018-honoured-or-refused.md. An entry is the one
declaration of its key: messages, annotations and docs/how-to/configuration-keys.md are made from it.
"""

from typing import Any, Final

from msgspec import Struct

from katapod.model.config_declaration import AnnotationRule

__all__ = [
    "OBSOLETE_KEYS",
    "OBSOLETE_TABLES",
    "REFUSED_ANNOTATIONS",
    "REFUSED_HYPERVISORS",
    "REFUSED_KEYS",
    "RefusedKey",
]


class RefusedKey(Struct, frozen=True):
    """A key that is not acted upon. `neutral`: the values that ask for nothing; empty: every value does. `why`: the
    reason for refusing others, or for accepting all of them."""

    name: str
    kind: Any
    neutral: tuple[object, ...]
    why: str
    annotation: AnnotationRule | None = None


_Names = list[str]
_POD = AnnotationRule()
_WORDS = AnnotationRule(separator=" ")


def _flag(name: str, why: str, *neutral: bool, pod: AnnotationRule | None = None) -> RefusedKey:
    return RefusedKey(name, bool, neutral or (False,), why, pod)


def _text(name: str, why: str, *neutral: str, pod: AnnotationRule | None = None) -> RefusedKey:
    return RefusedKey(name, str, ("", *neutral), why, pod)


def _number(name: str, why: str, *neutral: int, pod: AnnotationRule | None = None) -> RefusedKey:
    return RefusedKey(name, int, (0, *neutral), why, pod)


def _names(name: str, why: str, *neutral: list[str], pod: AnnotationRule | None = None) -> RefusedKey:
    return RefusedKey(name, _Names, ([], *neutral), why, pod)


def _any(name: str, kind: Any, why: str) -> RefusedKey:
    return RefusedKey(name, kind, (), why)


_NO_IMAGE = "the guest is a kernel and an initrd, there is no root disk image"
_NO_VFIO = "devices of the host are not passed through (VFIO)"
_NO_SPDK = "vhost-user block devices (SPDK) are not supported"
_NO_NUMA = "the guest has one NUMA node"
_NO_TEE = "confidential guests (SEV, SNP, TDX) are not supported"
_NO_SELINUX = "SELinux labels are not applied"
_NO_TRACE = "there is no OpenTelemetry exporter; KATAPOD_TRACE writes a trace to a file"
_NO_GUEST_PULL = "images are pulled by the host"
_NO_DUMP = "the memory of a guest that panics is not dumped; its console is logged"
_NO_SWAP = "a guest has no swap of its own"
_VIRTIO_BLK = "disks are virtio-blk; virtio-scsi, upstream's default, is taken to mean it"
_LOG_LEVEL = "QEMU has no log level; enable_debug makes guest and monitor say more"
_OTHERS_KEY = "it is a key of another hypervisor"
_REMOTE = f"{_OTHERS_KEY} (remote)"
_NO_CDH = "the agent has no confidential data hub"
_NO_REGO = "policies (Rego) are not supported"
_LIMITS_NOTHING = "it limits an annotation that is refused anyway"
_NO_CDI = "devices of the host are not passed through (CDI)"

_QEMU: Final = (
    _text("rootfs_type", _NO_IMAGE, "ext4", "xfs", "erofs"),
    _flag(
        "rootless",
        "Katapod itself is root; QEMU runs in a jail, as a user that no other sandbox has, whether this is set or not",
        pod=_POD,
    ),
    _any("valid_vhost_user_store_paths", _Names, _LIMITS_NOTHING),
    _any("valid_jailer_paths", _Names, _LIMITS_NOTHING),
    _text("kernel_verity_params", _NO_IMAGE, pod=_POD),
    _text("firmware_volume", "guests are booted without firmware variables", pod=_POD),
    _flag("enable_virtio_mem", "memory is plugged as DIMMs, and reclaim_guest_freed_memory gives it back", pod=_POD),
    _flag(
        "disable_block_device_use",
        "the engine's root file system is always shared, and false merely permits plugging it",
        False,
        True,
        pod=_POD,
    ),
    _text("block_device_driver", _VIRTIO_BLK, "virtio-scsi", "virtio-blk", pod=_POD),
    _flag("enable_vhost_user_store", _NO_SPDK, pod=_POD),
    _text(
        "vhost_user_store_path",
        _NO_SPDK,
        "/var/run/kata-containers/vhost-user",
        "/var/run/kata-containers/vhost-user/",
        pod=_POD,
    ),
    _number("vhost_user_reconnect_timeout_sec", _NO_SPDK, pod=_POD),
    _flag("enable_iommu", f"a guest's IOMMU serves passed-through devices, and {_NO_VFIO}", pod=_POD),
    _flag("enable_iommu_platform", f"a guest's IOMMU serves passed-through devices, and {_NO_VFIO}", pod=_POD),
    _flag("enable_numa", _NO_NUMA),
    _names("numa_mapping", _NO_NUMA, pod=_WORDS),
    _names("pflashes", "guests are booted without firmware variables"),
    _flag("disable_nesting_checks", "nothing is done differently inside a VM", False, True),
    _number("msize_9p", "9p is not supported, files are shared by virtio-fs", 8192, pod=_POD),
    _flag("disable_image_nvdimm", _NO_IMAGE, False, True, pod=_POD),
    _text("hot_plug_vfio", _NO_VFIO, "no-port", pod=_POD),
    _text("cold_plug_vfio", _NO_VFIO, "no-port", pod=_POD),
    _number(
        "pcie_switch_port",
        f"switch ports serve passed-through devices, and {_NO_VFIO}",
        pod=AnnotationRule(positive=True),
    ),
    _text("guest_memory_dump_path", _NO_DUMP),
    _flag("guest_memory_dump_paging", _NO_DUMP),
    _flag("enable_guest_swap", _NO_SWAP, pod=_POD),
    _flag(
        "use_legacy_serial",
        "the console is always a 16550, whose driver is there before any module is loaded",
        False,
        True,
        pod=_POD,
    ),
    _flag("disable_selinux", _NO_SELINUX, False, True),
    _flag("disable_guest_selinux", _NO_SELINUX, False, True),
    _number("hypervisor_loglevel", _LOG_LEVEL, 1),
    _flag("confidential_guest", _NO_TEE),
    _flag("sev_snp_guest", _NO_TEE),
    _text("snp_id_block", _NO_TEE),
    _text("snp_id_auth", _NO_TEE),
    RefusedKey("snp_guest_policy", int, (0x30000,), _NO_TEE),
    _text("measurement_algo", _NO_TEE, "sha512"),
    _number("tdx_quote_generation_service_socket_port", _NO_TEE),
    RefusedKey("guest_extension_images", list[dict[str, object]], ([],), _NO_IMAGE),
    _flag("disable_seccomp", f"{_OTHERS_KEY}; QEMU's filter is set by seccompsandbox"),
    _text("jailer_path", f"{_OTHERS_KEY} (Firecracker)", pod=_POD),
    *(
        _number(f"{kind}_rate_limiter_{unit}_{limit}", f"{_OTHERS_KEY} (Cloud Hypervisor)")
        for kind in ("disk", "net")
        for unit in ("bw", "ops")
        for limit in ("max_rate", "one_time_burst")
    ),
    _text("remote_hypervisor_socket", _REMOTE, "/run/peerpod/hypervisor.sock"),
    _number("remote_hypervisor_timeout", _REMOTE, 600),
    # the Rust runtime's
    _text("log_level", _LOG_LEVEL, "trace", "debug", "info", "warn", "error", "critical"),
    _flag("hotplug_vfio_on_root_bus", _NO_VFIO),
    _text("vm_rootfs_driver", _NO_IMAGE, "virtio-pmem", "virtio-blk-pci"),
    _number("queue_size", "disks have QEMU's own queues", 128),
    _number("num_queues", "disks have QEMU's own queues", 1),
    _number("network_queues", "a NIC has as many queues as the sandbox has vCPUs when it starts", 1),
    RefusedKey("overhead_vcpus", float, (0.0, 0.2), "all sizes follow from one formula: docs/how-to/memory.md"),
    _number("overhead_memory", "guest_base_memory in [katapod] takes its place", 32),
    _text("ctlpath", _OTHERS_KEY),
    _names("valid_ctlpaths", _OTHERS_KEY),
    _text("prefetch_list_path", "there are no nydus images to prefetch"),
    _text("hugepage_type", "huge pages are the host's default ones", "hugetlbfs"),
    _flag("virtio_fs_is_dax", "neither QEMU's nor Rust's virtiofsd has DAX"),
    _text("guest_swap_path", _NO_SWAP, "/run/kata-containers/swap"),
    _number("guest_swap_size_percent", _NO_SWAP, 100),
    _number("guest_swap_create_threshold_secs", _NO_SWAP, 60),
    _flag("boot_to_be_template", "templates are made automatically: enable_template in [factory]"),
    _flag("boot_from_template", "templates are made automatically: enable_template in [factory]"),
    _text("memory_path", "templates are made automatically: template_path in [factory]"),
    _text("device_state_path", "templates are made automatically: template_path in [factory]"),
)

_AGENT: Final = (
    _flag("enable_tracing", _NO_TRACE, pod=_POD),
    _number("cdh_api_timeout", _NO_CDH, 50),
    _number("cdh_api_timeout_ms", _NO_CDH, 50_000),
    _number("launch_process_timeout", _NO_CDH, 6),
    _flag("visible_cdi_devices", _NO_CDI),
    # the Rust runtime's
    _text("log_level", "enable_debug sets the level", "info", "warn", "error", "critical"),
    _number("dial_timeout_ms", "it limits one attempt; dial_timeout, in seconds, limits all of them", 10),
    _number("reconnect_timeout_ms", "dial_timeout, in seconds, says how long to wait for the agent", 3000),
    _number("server_port", "the agent's port is fixed by the protocol", 1024),
    _number("log_port", "the agent's log is on the guest's console", 1025),
    _number("passfd_listener_port", "streams travel through the agent", 1027),
    _number("health_check_request_timeout_ms", "the agent's health is checked every 5 seconds", 90_000),
    _number("container_pipe_size", "pipes have the kernel's default size", pod=_POD),
    _text("policy", _NO_REGO),
    RefusedKey("mem_agent", dict[str, object], ({}, {"mem_agent_enable": False}), "there is no memory agent"),
)

_RUNTIME: Final = (
    _flag(
        "enable_vcpus_pinning",
        "vCPU threads are not pinned; the pod's cpuset holds for all of them",
        pod=AnnotationRule(name="io.katacontainers.enable_vcpus_pinning"),
    ),
    _text("guest_selinux_label", _NO_SELINUX, pod=_POD),
    _flag("enable_tracing", _NO_TRACE),
    _text("jaeger_endpoint", _NO_TRACE),
    _text("jaeger_user", _NO_TRACE),
    _text("jaeger_password", _NO_TRACE),
    _flag(
        "disable_new_netns",
        "a pod is in the network namespace that its engine names, or in a new one; run makes one for a network only",
        pod=_POD,
    ),
    _text("vfio_mode", _NO_VFIO, "guest-kernel", pod=_POD),
    _flag("disable_guest_empty_dir", "emptyDir volumes are directories of the host, and shared", False, True),
    _text("emptydir_mode", "emptyDir volumes are shared directories", "shared-fs"),
    _names("experimental", "there are no experimental features", pod=_WORDS),
    _flag("enable_pprof", "the profiler is Go's; KATAPOD_TRACE writes a trace to a file", pod=_POD),
    _text("dan_conf", "networks that are attached directly are not supported", "/run/kata-containers/dans"),
    _flag("experimental_force_guest_pull", _NO_GUEST_PULL, pod=_POD),
    _any("kubelet_root_dir", str, "volumes are shared wherever they lie"),
    _text("pod_resource_api_sock", _NO_CDI),
    # the Rust runtime's
    _text("log_level", "enable_debug sets the level", "info", "warn", "error", "critical"),
    _text("name", "there is one runtime", "virt_container"),
    _text("hypervisor_name", "there is one hypervisor", "qemu"),
    _text("agent_name", "there is one agent", "kata"),
    _flag("keep_abnormal", "a sandbox that fails leaves nothing behind"),
    RefusedKey("shared_mounts", list[dict[str, object]], ([],), "mounts are not shared between containers"),
    _flag("use_passfd_io", "streams travel through the agent"),
    _number("passfd_listener_port", "streams travel through the agent", 1027),
)

REFUSED_KEYS: Final[dict[str, dict[str, RefusedKey]]] = {
    table: {key.name: key for key in keys}
    for table, keys in (("hypervisor.qemu", _QEMU), ("agent.kata", _AGENT), ("runtime", _RUNTIME))
}

REFUSED_ANNOTATIONS: Final[dict[str, str]] = {
    "io.katacontainers.config.hypervisor.image_hash": "there is no image",
    "io.katacontainers.config.hypervisor.jailer_hash": "there is no jailer",
    "io.katacontainers.config.hypervisor.firmware_volume_hash": "there is no firmware_volume",
    "io.katacontainers.config.hypervisor.cc_init_data": _NO_TEE,
    "io.katacontainers.config.hypervisor.default_gpus": _REMOTE,
    "io.katacontainers.config.hypervisor.default_gpu_model": _REMOTE,
    "io.katacontainers.config.agent.policy": _NO_REGO,
    "io.katacontainers.container.resource.swappiness": _NO_SWAP,
    "io.katacontainers.container.resource.swap_in_bytes": _NO_SWAP,
}
"""Those that set no key, or that no value makes harmless, each with the reason."""

REFUSED_HYPERVISORS: Final = ("firecracker", "clh", "dragonball", "stratovirt", "remote", "acrn")

OBSOLETE_KEYS: Final[dict[str, tuple[str, ...]]] = {
    "hypervisor.qemu": (
        "use_vsock",
        "enable_swap",
        "file_mem_backend",
        "valid_file_mem_backends",
        "enable_blk_mount",
        "pcie_root_bus",
    ),
    "agent.kata": ("trace_mode", "trace_type"),
    "runtime": ("enable_cpu_memory_hotplug", "enable_netmon"),
}
"""Keys of older releases that files in the field still hold; upstream 4.1 ignores them too."""

OBSOLETE_TABLES: Final = ("proxy.kata", "shim.kata", "netmon")
"""Tables of Kata 1.x."""
