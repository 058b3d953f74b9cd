"""Annotations of a pod that change its configuration."""

import hashlib
from pathlib import Path

import pytest

from katapod.model.config import Config, ParsedConfig, parse_config
from katapod.model.config_annotations import annotated, apply_annotations, known_annotations
from katapod.model.config_keys import TABLES
from katapod.model.config_refused import REFUSED_KEYS
from katapod.model.errors import ConfigError

HYPERVISOR = "io.katacontainers.config.hypervisor."
ALL_ALLOWED = """
[hypervisor.qemu]
enable_annotations = [".*"]
kernel_params = "a=1 b"
virtio_fs_extra_args = ["-x"]
valid_hypervisor_paths = ["/usr/bin/qemu*"]
"""


def config(text: str = ALL_ALLOWED) -> Config:
    return parse_config(text.encode()).config


def applied(name: str, value: str, before: Config | None = None) -> Config:
    files = {"/usr/bin/qemu*": ["/usr/bin/qemu-system-x86_64", "/usr/bin/qemu-kiwi"]}
    return apply_annotations(
        before or config(), {name: value}, host_cpus=4, expand=lambda pattern: files.get(pattern, [])
    ).config


@pytest.mark.parametrize(
    ("name", "value", "field", "seen"),
    [
        ("default_memory", "512", "default_memory", 512),
        ("default_vcpus", "1.5", "default_vcpus", 1.5),
        ("default_max_vcpus", "3", "default_maxvcpus", 3),
        ("kernel_params", "a=2 c", "kernel_params", "b a=2 c"),
        ("virtio_fs_extra_args", '["-y"]', "virtio_fs_extra_args", ("-x", "-y")),
        ("path", "/usr/bin/qemu-kiwi", "path", "/usr/bin/qemu-kiwi"),
        ("kernel", "/k", "kernel", "/k"),
        ("enable_iothreads", "T", "enable_iothreads", True),
        ("reclaim_guest_freed_memory", "0", "reclaim_guest_freed_memory", False),
        ("blk_logical_sector_size", "4096", "block_device_logical_sector_size", 4096),
        ("block_device_aio", "native", "block_device_aio", "native"),
        ("memory_slots", "0", "memory_slots", 10),
        ("machine_type", "", "machine_type", "q35"),
        ("pcie_root_port", "2", "pcie_root_port", 2),
        ("rx_rate_limiter_max_rate", "1000", "rx_rate_limiter_max_rate", 1000),
        ("hot_plug_vfio", "no-port", "path", "/usr/bin/qemu-system-x86_64"),
    ],
)
def test_of_the_hypervisor(name: str, value: str, field: str, seen: object) -> None:
    assert getattr(applied(HYPERVISOR + name, value).qemu, field) == seen


def test_of_runtime_and_agent_need_no_permission() -> None:
    found = apply_annotations(
        Config(),
        {
            "io.katacontainers.config.runtime.sandbox_cgroup_only": "true",
            "io.katacontainers.config.runtime.create_container_timeout": "9",
            "io.katacontainers.config.agent.kernel_modules": "overlay metacopy=on; tun",
            "io.kubernetes.cri.container-type": "sandbox",
        },
        host_cpus=4,
    ).config
    assert found.runtime.sandbox_cgroup_only
    assert found.runtime.create_container_timeout == 9
    assert found.agent.kernel_modules == ("overlay metacopy=on", "tun")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        (f"{HYPERVISOR}default_memory", "255", "255 MiB is less than a guest needs"),
        (f"{HYPERVISOR}default_memory", "0x200", "is not a whole number"),
        (f"{HYPERVISOR}default_memory", "-1", "is not a whole number"),
        (f"{HYPERVISOR}default_vcpus", "5", "more than the 4 CPUs of this host"),
        (f"{HYPERVISOR}default_vcpus", "nan", "is not a number"),
        (f"{HYPERVISOR}enable_iothreads", "yes", "is neither true nor false"),
        (f"{HYPERVISOR}path", "/bin/sh", "is not one of the files that valid_hypervisor_paths allows"),
        (f"{HYPERVISOR}entropy_source", "/dev/zero", "is not one of the files that valid_entropy_sources allows"),
        (f"{HYPERVISOR}kernel", "vmlinuz", "is not an absolute path"),
        (f"{HYPERVISOR}kernel_hash", "abc", "128 hexadecimal digits"),
        (f"{HYPERVISOR}pcie_root_port", "0", "must be greater than 0"),
        (f"{HYPERVISOR}virtio_fs_extra_args", "-y", "is not a JSON array of strings"),
        (f"{HYPERVISOR}block_device_aio", "magic", "'magic' is not one of threads, native, io_uring"),
        (f"{HYPERVISOR}image", "/i", "not supported: the guest is a kernel and an initrd"),
        (f"{HYPERVISOR}rootless", "true", "not supported: Katapod itself is root"),
        (f"{HYPERVISOR}cc_init_data", "x", "not supported: confidential guests"),
        (f"{HYPERVISOR}default_memroy", "512", f"did you mean {HYPERVISOR}default_memory?"),
        ("io.katacontainers.config.runtime.vfio_mode", "vfio", "VFIO"),
        ("io.katacontainers.config.agent.policy", "x", "policies (Rego) are not supported"),
        ("io.katacontainers.enable_vcpus_pinning", "true", "not pinned"),
        ("io.katacontainers.container.resource.swappiness", "60", "no swap of its own"),
    ],
)
def test_what_ends_the_start_names_annotation_and_reason(name: str, value: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        applied(name, value)
    assert str(caught.value).startswith(f"cannot use the annotation {name}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("allowed", "name", "passes"),
    [
        ("default_memory", "default_memory", True),
        ("memory", "default_memory", True),
        ("^memory$", "default_memory", False),
        ("kernel", "default_memory", False),
        ("", "default_memory", True),
    ],
)
def test_the_match_is_anywhere_in_the_name(allowed: str, name: str, passes: bool) -> None:
    before = config(f'[hypervisor.qemu]\nenable_annotations = ["{allowed}"]\n')
    if passes:
        assert applied(HYPERVISOR + name, "512", before).qemu.default_memory == 512
    else:
        with pytest.raises(ConfigError, match="it is not enabled: no pattern of enable_annotations in"):
            applied(HYPERVISOR + name, "512", before)


def test_nothing_of_the_hypervisor_is_allowed_by_default() -> None:
    for name in [name for name in known_annotations() if name.startswith(HYPERVISOR)]:
        with pytest.raises(ConfigError, match="it is not enabled"):
            applied(name, "1", Config())


def test_every_annotation_has_a_key_or_a_reason() -> None:
    fields = {table: getattr(Config(), field) for table, field in TABLES.items()}
    for name, known in known_annotations().items():
        if known.key:
            assert hasattr(fields[known.table], known.key) or known.key in REFUSED_KEYS[known.table], name
        else:
            assert known.why or name.endswith("_hash"), name


def test_all_errors_come_at_once() -> None:
    wrong = {f"{HYPERVISOR}default_memory": "x", f"{HYPERVISOR}default_vcpus": "y"}
    with pytest.raises(ConfigError) as caught:
        apply_annotations(config(), wrong, host_cpus=4)
    assert len(str(caught.value).splitlines()) == 2


def test_a_file_has_the_hash_that_is_given(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"guest")
    digest = hashlib.sha512(b"guest").hexdigest()
    names = {f"{HYPERVISOR}kernel": str(kernel), f"{HYPERVISOR}kernel_hash": digest.upper()}
    parsed = annotated(ParsedConfig(config()), names, 4)
    assert parsed.config.qemu.kernel == str(kernel)
    kernel.write_bytes(b"other")
    with pytest.raises(ConfigError, match="its SHA-512 is "):
        annotated(ParsedConfig(config()), names, 4)
    kernel.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        annotated(ParsedConfig(config()), names, 4)
