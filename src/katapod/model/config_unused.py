"""The keys of configuration.toml that Katapod knows but does not act upon.

The keys that it acts upon are the fields of the structs in config_keys.py. Together they are every key of
upstream's QEMU configuration file, so that any other key is a mistake that can be pointed out.

A key of this table is accepted in silence while it has a value that asks for nothing: upstream's
default, or a value that says what Katapod does anyway. Any other value is reported.
"""

from typing import Any, Final

from msgspec import Struct

__all__ = ["OBSOLETE_KEYS", "OBSOLETE_TABLES", "RUST_NAMES", "UNUSED_KEYS", "UnusedKey"]


class UnusedKey(Struct, frozen=True):
    """A key that this version does not act upon.

    `neutral`: the values that ask for nothing; empty = every value does, as `why` explains.
    """

    name: str
    kind: Any
    neutral: tuple[object, ...]
    why: str = ""


_Names = list[str]
_NO_ANNOTATION = "limits what annotations may set; this version lets them set nothing"


def _flag(name: str, *neutral: bool) -> UnusedKey:
    return UnusedKey(name, bool, neutral or (False,))


def _text(name: str, *neutral: str) -> UnusedKey:
    return UnusedKey(name, str, ("", *neutral))


def _number(name: str, *neutral: int) -> UnusedKey:
    return UnusedKey(name, int, (0, *neutral))


def _names(name: str, *neutral: list[str]) -> UnusedKey:
    return UnusedKey(name, _Names, ([], *neutral))


_QEMU: Final = (
    _text("rootfs_type", "ext4", "xfs", "erofs"),  # of an image; only initrds are supported
    _flag("rootless"),
    _names("enable_annotations", ["enable_iommu", "kernel_params", "kernel_verity_params"], ["enable_iommu"]),
    UnusedKey("valid_hypervisor_paths", _Names, (), _NO_ANNOTATION),
    UnusedKey("valid_virtio_fs_daemon_paths", _Names, (), _NO_ANNOTATION),
    UnusedKey("valid_vhost_user_store_paths", _Names, (), _NO_ANNOTATION),
    UnusedKey("valid_entropy_sources", _Names, (), _NO_ANNOTATION),
    UnusedKey("valid_jailer_paths", _Names, (), _NO_ANNOTATION),
    _text("kernel_verity_params"),
    _text("firmware"),
    _text("firmware_volume"),
    _text("machine_accelerators"),
    _number("default_bridges", 1),
    _number("memory_offset"),
    _flag("enable_virtio_mem"),
    _flag("disable_block_device_use", False, True),  # this version shares every root file system
    _text("block_device_driver", "virtio-scsi", "virtio-blk"),
    _text("block_device_aio", "io_uring", "threads"),
    _flag("block_device_cache_set"),
    _flag("block_device_cache_direct"),
    _flag("block_device_cache_noflush"),
    _number("block_device_logical_sector_size"),
    _number("block_device_physical_sector_size"),
    _flag("enable_iothreads"),
    _number("indep_iothreads"),
    _flag("enable_mem_prealloc"),
    _flag("reclaim_guest_freed_memory"),
    _flag("enable_hugepages"),
    _flag("enable_vhost_user_store"),
    _text("vhost_user_store_path", "/var/run/kata-containers/vhost-user", "/var/run/kata-containers/vhost-user/"),
    _number("vhost_user_reconnect_timeout_sec"),
    _flag("enable_iommu"),
    _flag("enable_iommu_platform"),
    _flag("enable_numa"),
    _names("numa_mapping"),
    _names("pflashes"),
    _text("extra_monitor_socket"),
    _flag("disable_nesting_checks"),
    _number("msize_9p", 8192),
    _flag("disable_image_nvdimm", False, True),  # there is no image
    _text("hot_plug_vfio", "no-port"),
    _text("cold_plug_vfio", "no-port"),
    _number("pcie_root_port"),
    _number("pcie_switch_port"),
    _text("guest_hook_path"),
    _text("guest_memory_dump_path"),
    _flag("guest_memory_dump_paging"),
    _flag("enable_guest_swap"),
    _flag("use_legacy_serial"),
    _flag("disable_selinux", False, True),  # nothing is labelled in either case
    _flag("disable_guest_selinux", False, True),
    _number("hypervisor_loglevel", 1),
    _flag("confidential_guest"),
    _flag("sev_snp_guest"),
    _text("snp_id_block"),
    _text("snp_id_auth"),
    UnusedKey("snp_guest_policy", int, (0x30000,)),
    _text("measurement_algo", "sha512"),
    _number("tdx_quote_generation_service_socket_port"),
    UnusedKey("guest_extension_images", list[dict[str, object]], ([],)),
    _flag("disable_seccomp"),
    _text("jailer_path"),
    *(
        _number(f"{kind}_rate_limiter_{unit}_{limit}")
        for kind in ("disk", "net")
        for unit in ("bw", "ops")
        for limit in ("max_rate", "one_time_burst")
    ),
    _text("remote_hypervisor_socket", "/run/peerpod/hypervisor.sock"),
    _number("remote_hypervisor_timeout", 600),
)

_AGENT: Final = (
    _flag("enable_tracing"),
    _number("cdh_api_timeout", 50),
    _number("launch_process_timeout", 6),
    _flag("visible_cdi_devices"),
)

_RUNTIME: Final = (
    _flag("enable_vcpus_pinning"),
    _text("guest_selinux_label"),
    _flag("enable_tracing"),
    _text("jaeger_endpoint"),
    _text("jaeger_user"),
    _text("jaeger_password"),
    _flag("disable_new_netns"),
    _names("sandbox_bind_mounts"),
    _text("vfio_mode", "guest-kernel"),
    _flag("disable_guest_empty_dir", False, True),
    _text("emptydir_mode", "shared-fs"),
    _names("experimental"),
    _flag("enable_pprof"),
    _text("dan_conf", "/run/kata-containers/dans"),
    _flag("experimental_force_guest_pull"),
    _text("kubelet_root_dir", "/var/lib/kubelet"),
    _text("pod_resource_api_sock"),
)

UNUSED_KEYS: Final[dict[str, dict[str, UnusedKey]]] = {
    table: {key.name: key for key in keys}
    for table, keys in (
        ("hypervisor.qemu", _QEMU),
        ("agent.kata", _AGENT),
        ("runtime", _RUNTIME),
    )
}

OBSOLETE_KEYS: Final[dict[str, tuple[str, ...]]] = {
    "hypervisor.qemu": (
        "use_vsock",
        "enable_swap",
        "file_mem_backend",
        "valid_file_mem_backends",
        "hotplug_vfio_on_root_bus",
        "enable_blk_mount",
        "pcie_root_bus",
    ),
    "agent.kata": ("trace_mode", "trace_type"),
    "runtime": ("enable_cpu_memory_hotplug", "enable_netmon"),
}
"""Keys of older releases that files in the field still hold; upstream 4.1 ignores them too."""

OBSOLETE_TABLES: Final = ("proxy.kata", "shim.kata", "netmon")
"""Tables of Kata 1.x."""

RUST_NAMES: Final = {
    "seccomp_sandbox": "[hypervisor.qemu] seccompsandbox",
    "log_level": "enable_debug",
    "selinux_label": "[runtime] guest_selinux_label",
    "create_container_timeout": "[runtime] create_container_timeout",
    "dial_timeout_ms": "[agent.kata] dial_timeout (in seconds)",
    "cdh_api_timeout_ms": "[agent.kata] cdh_api_timeout (in seconds)",
}
"""Key of the Rust runtime's dialect of the file -> the name used here."""
