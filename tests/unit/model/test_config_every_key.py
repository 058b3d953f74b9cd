"""Every key of upstream's QEMU configuration file: what it changes in what is planned, or why it is refused."""

import asyncio
import logging
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import structs

from katapod.cli.pool import end_pool
from katapod.cli.settings import Globals
from katapod.host.facts import HostFacts
from katapod.model import oci
from katapod.model.config import SECTIONS, Config, ParsedConfig, judge_config, parse_config
from katapod.model.config_annotations import apply_annotations
from katapod.model.config_refused import REFUSED_KEYS
from katapod.model.errors import ConfigError, KatapodError
from katapod.model.ids import ContainerId
from katapod.model.layout import Layout
from katapod.model.record import SandboxRecord
from katapod.model.sizing import ContainerLimits, HostCapacity, SizeSettings, size_pod
from katapod.plan.cgroup import Hierarchy, plan_cgroup
from katapod.plan.container_spec import ContainerOptions
from katapod.plan.virtiofsd import VirtiofsdImplementation
from katapod.sandbox import planning
from katapod.sandbox.machine import _create_request
from katapod.sandbox.planning import plan_sandbox, size_for
from katapod.supervisor.container_source import prepare_container
from katapod.supervisor.run_request import RunRequest
from katapod.vmm.devices import Disk
from katapod.vmm.qemu.command_line import options_of
from katapod.vmm.qemu.hotplug import more_bridge_slots, plan_disk, plan_memory, plan_shared_directory
from katapod.vmm.spec import Accelerator

QEMU, AGENT, RUNTIME, FACTORY = "hypervisor.qemu", "agent.kata", "runtime", "factory"

KEYS = {
    QEMU: """
        path kernel image initrd machine_type rootfs_type rootless enable_annotations valid_hypervisor_paths
        kernel_params kernel_verity_params firmware firmware_volume machine_accelerators seccompsandbox
        cpu_features default_vcpus default_maxvcpus default_bridges default_memory memory_slots
        default_maxmemory memory_offset enable_virtio_mem disable_block_device_use shared_fs
        virtio_fs_daemon valid_virtio_fs_daemon_paths virtio_fs_cache_size virtio_fs_queue_size
        virtio_fs_extra_args virtio_fs_cache block_device_driver block_device_aio block_device_cache_set
        block_device_cache_direct block_device_cache_noflush block_device_logical_sector_size
        block_device_physical_sector_size enable_iothreads indep_iothreads enable_mem_prealloc
        reclaim_guest_freed_memory enable_hugepages enable_vhost_user_store vhost_user_store_path
        valid_vhost_user_store_paths vhost_user_reconnect_timeout_sec enable_iommu enable_iommu_platform
        enable_numa numa_mapping pflashes enable_debug extra_monitor_socket disable_nesting_checks msize_9p
        disable_image_nvdimm hot_plug_vfio cold_plug_vfio pcie_root_port pcie_switch_port disable_vhost_net
        entropy_source valid_entropy_sources guest_hook_path rx_rate_limiter_max_rate
        tx_rate_limiter_max_rate guest_memory_dump_path guest_memory_dump_paging enable_guest_swap
        use_legacy_serial disable_selinux disable_guest_selinux hypervisor_loglevel confidential_guest
        sev_snp_guest snp_id_block snp_id_auth snp_guest_policy measurement_algo
        tdx_quote_generation_service_socket_port guest_extension_images disable_seccomp jailer_path
        valid_jailer_paths disk_rate_limiter_bw_max_rate disk_rate_limiter_bw_one_time_burst
        disk_rate_limiter_ops_max_rate disk_rate_limiter_ops_one_time_burst net_rate_limiter_bw_max_rate
        net_rate_limiter_bw_one_time_burst net_rate_limiter_ops_max_rate net_rate_limiter_ops_one_time_burst
        remote_hypervisor_socket remote_hypervisor_timeout
    """,
    FACTORY: """
        enable_template template_path vm_cache_number vm_cache_endpoint
    """,
    AGENT: """
        enable_debug enable_tracing kernel_modules debug_console_enabled dial_timeout cdh_api_timeout
        launch_process_timeout visible_cdi_devices
    """,
    RUNTIME: """
        enable_debug internetworking_model disable_guest_seccomp enable_vcpus_pinning guest_selinux_label
        enable_tracing jaeger_endpoint jaeger_user jaeger_password disable_new_netns sandbox_cgroup_only
        static_sandbox_resource_mgmt sandbox_bind_mounts vfio_mode disable_guest_empty_dir emptydir_mode
        experimental enable_pprof create_container_timeout dan_conf experimental_force_guest_pull
        kubelet_root_dir pod_resource_api_sock
    """,
}
"""Of Kata Containers 4.1's QEMU file, Go runtime."""

EFFECTS = [
    (QEMU, 'path = "/opt/qemu"', "/opt/qemu\n"),
    (QEMU, 'kernel = "/k"', "-kernel /k"),
    (QEMU, 'initrd = "/i"', "-initrd /i"),
    (QEMU, 'enable_annotations = ["kernel_params"]', "annotation kernel_params: ok"),
    (QEMU, 'enable_annotations = ["path"]\nvalid_hypervisor_paths = ["/q"]', "annotation path: ok"),
    (QEMU, 'enable_annotations = ["daemon"]\nvalid_virtio_fs_daemon_paths = ["/v"]', "virtio_fs_daemon: ok"),
    (QEMU, 'enable_annotations = ["entropy"]\nvalid_entropy_sources = ["/e"]', "annotation entropy_source: ok"),
    (QEMU, 'kernel_params = "a=1 b"', " a=1 b\n"),
    (QEMU, 'firmware = "/fw"', "-bios /fw"),
    (QEMU, 'machine_accelerators = "hpet=off, usb=off"', "vmport=off,hpet=off,usb=off"),
    (QEMU, 'seccompsandbox = "on"', "-sandbox on\n"),
    (QEMU, 'cpu_features = "x2apic=off"', "fsrm=off,x2apic=off"),
    (QEMU, "default_vcpus = 1.5", "-smp 2,"),
    (QEMU, "default_maxvcpus = 3", "sockets=3,maxcpus=3"),
    (QEMU, "default_bridges = 2", "id=pci-bridge-1,chassis_nr=2,shpc=off,addr=3"),
    (QEMU, "default_memory = 512", "-m 512M,"),
    (QEMU, "memory_slots = 3", "slots=3,"),
    (QEMU, "default_maxmemory = 4096", "maxmem=4096M"),
    (QEMU, "memory_offset = 1000", "maxmem=9192M"),
    (QEMU, 'virtio_fs_daemon = "/opt/virtiofsd"', "/opt/virtiofsd -f"),
    (QEMU, "virtio_fs_queue_size = 512", "'queue-size': 512"),
    (QEMU, 'virtio_fs_extra_args = ["-d"]', " -d\n"),
    (QEMU, 'virtio_fs_cache = "never"', "cache=none"),
    (QEMU, 'block_device_aio = "io_uring"', "'aio': 'io_uring'"),
    (QEMU, "block_device_cache_set = true", "'cache': {'direct': False, 'no-flush': False}"),
    (QEMU, "block_device_cache_set = true\nblock_device_cache_direct = true", "'direct': True"),
    (QEMU, "block_device_cache_set = true\nblock_device_cache_noflush = true", "'no-flush': True}}"),
    (QEMU, "block_device_logical_sector_size = 4096", "'logical_block_size': 4096"),
    (QEMU, "block_device_physical_sector_size = 4096", "'physical_block_size': 4096"),
    (QEMU, "enable_iothreads = true", "-object iothread,id=iothread0"),
    (QEMU, "indep_iothreads = 2", "-object iothread,id=iothread1"),
    (QEMU, "enable_mem_prealloc = true", "share=on,prealloc=on"),
    (QEMU, "reclaim_guest_freed_memory = false", "--device virtio-balloon-pci"),
    (QEMU, "enable_hugepages = true", "share=on,hugetlb=on,prealloc=on"),
    (QEMU, "enable_debug = true", " debug panic=1"),
    (QEMU, 'enable_debug = true\nextra_monitor_socket = "hmp"', "-mon chardev=extra,mode=readline"),
    (QEMU, "pcie_root_port = 2", "pcie-root-port,id=rp1,bus=pcie.0,chassis=17,slot=1"),
    (QEMU, "disable_vhost_net = true", "vhost=False"),
    (QEMU, 'entropy_source = "/dev/random"', "filename=/dev/random"),
    (QEMU, 'guest_hook_path = "/usr/share/hooks"', 'guest_hook_path: "/usr/share/hooks"'),
    (QEMU, "rx_rate_limiter_max_rate = 1000", "rx_rate=1000"),
    (QEMU, "tx_rate_limiter_max_rate = 1000", "tx_rate=1000"),
    (FACTORY, "enable_template = false", "template: None"),
    (FACTORY, 'template_path = "/t"', " in /t\n"),
    (FACTORY, "vm_cache_number = 3", "pool: 3 "),
    ("katapod", 'jail_uids = "2000-2999"', "users: 2000-2999"),
    (FACTORY, f'vm_cache_endpoint = "/run/{"x" * 120}"', "the pool at /run/xxx"),
    (AGENT, "enable_debug = true", "agent.log=debug"),
    (AGENT, 'kernel_modules = ["overlay metacopy=on"]', 'name: "overlay"\n  parameters: "metacopy=on"'),
    (AGENT, "debug_console_enabled = true", "agent.debug_console agent.debug_console_vport=1026"),
    (AGENT, "dial_timeout = 7", "agent answers within 7.0"),
    (RUNTIME, "enable_debug = true", "log level: DEBUG"),
    (RUNTIME, 'internetworking_model = "macvtap"', "Interworking.MACVTAP"),
    (RUNTIME, "disable_guest_seccomp = true", "guest_seccomp=False"),
    (RUNTIME, "sandbox_cgroup_only = true", "/pod/"),
    (RUNTIME, "static_sandbox_resource_mgmt = true", "pod of 1 GiB:"),
    (RUNTIME, 'sandbox_bind_mounts = ["/srv/a"]', "shown to the guest: /srv/a"),
    (RUNTIME, "create_container_timeout = 9", "create_timeout_s=9.0"),
]

REFUSALS = [
    (QEMU, 'image = "/a.img"', "the guest is a kernel and an initrd"),
    (QEMU, 'machine_type = "microvm"', "only q35 has the PCIe hot-plug"),
    (QEMU, 'rootfs_type = "btrfs"', "there is no root disk image"),
    (QEMU, "rootless = true", "Katapod itself is root"),
    (QEMU, 'kernel_verity_params = "root_hash=1"', "there is no root disk image"),
    (QEMU, 'firmware_volume = "/x"', "without firmware variables"),
    (QEMU, "enable_virtio_mem = true", "memory is plugged as DIMMs"),
    (QEMU, 'shared_fs = "virtio-9p"', "by virtio-fs only"),
    (QEMU, "virtio_fs_cache_size = 1024", "has DAX"),
    (QEMU, 'block_device_driver = "nvdimm"', "disks are virtio-blk"),
    (QEMU, "enable_vhost_user_store = true", "SPDK"),
    (QEMU, 'vhost_user_store_path = "/x"', "SPDK"),
    (QEMU, "vhost_user_reconnect_timeout_sec = 1", "SPDK"),
    (QEMU, "enable_iommu = true", "VFIO"),
    (QEMU, "enable_iommu_platform = true", "VFIO"),
    (QEMU, "enable_numa = true", "one NUMA node"),
    (QEMU, 'numa_mapping = ["0"]', "one NUMA node"),
    (QEMU, 'pflashes = ["/x"]', "without firmware variables"),
    (QEMU, "msize_9p = 16384", "9p is not supported"),
    (QEMU, 'hot_plug_vfio = "root-port"', "VFIO"),
    (QEMU, 'cold_plug_vfio = "root-port"', "VFIO"),
    (QEMU, "pcie_switch_port = 1", "VFIO"),
    (QEMU, 'guest_memory_dump_path = "/x"', "its console is"),
    (QEMU, "guest_memory_dump_paging = true", "its console is"),
    (QEMU, "enable_guest_swap = true", "no swap of its own"),
    (QEMU, "hypervisor_loglevel = 3", "enable_debug makes"),
    (QEMU, "confidential_guest = true", "confidential guests"),
    (QEMU, "sev_snp_guest = true", "confidential guests"),
    (QEMU, 'snp_id_block = "x"', "confidential guests"),
    (QEMU, 'snp_id_auth = "x"', "confidential guests"),
    (QEMU, "snp_guest_policy = 1", "confidential guests"),
    (QEMU, 'measurement_algo = "sha384"', "confidential guests"),
    (QEMU, "tdx_quote_generation_service_socket_port = 4050", "confidential guests"),
    (QEMU, 'guest_extension_images = [{name = "x"}]', "there is no root disk image"),
    (QEMU, "disable_seccomp = true", "set by seccompsandbox"),
    (QEMU, 'jailer_path = "/x"', "Firecracker"),
    *(
        (QEMU, f"{kind}_rate_limiter_{unit}_{what} = 1", "Cloud Hypervisor")
        for kind in ("disk", "net")
        for unit in ("bw", "ops")
        for what in ("max_rate", "one_time_burst")
    ),
    (QEMU, 'remote_hypervisor_socket = "/x"', "remote"),
    (QEMU, "remote_hypervisor_timeout = 1", "remote"),
    (AGENT, "enable_tracing = true", "OpenTelemetry"),
    (AGENT, "cdh_api_timeout = 9", "confidential data hub"),
    (AGENT, "launch_process_timeout = 9", "confidential data hub"),
    (AGENT, "visible_cdi_devices = true", "CDI"),
    (RUNTIME, "enable_vcpus_pinning = true", "not pinned"),
    (RUNTIME, 'guest_selinux_label = "a:b:c"', "SELinux"),
    (RUNTIME, "enable_tracing = true", "OpenTelemetry"),
    (RUNTIME, 'jaeger_endpoint = "x"', "OpenTelemetry"),
    (RUNTIME, 'jaeger_user = "x"', "OpenTelemetry"),
    (RUNTIME, 'jaeger_password = "x"', "OpenTelemetry"),
    (RUNTIME, "disable_new_netns = true", "network namespace"),
    (RUNTIME, 'vfio_mode = "vfio"', "VFIO"),
    (RUNTIME, 'emptydir_mode = "block-plain"', "shared directories"),
    (RUNTIME, 'experimental = ["x"]', "no experimental features"),
    (RUNTIME, "enable_pprof = true", "the profiler is Go's"),
    (RUNTIME, 'dan_conf = "/x"', "attached directly"),
    (RUNTIME, "experimental_force_guest_pull = true", "pulled by the host"),
    (RUNTIME, 'pod_resource_api_sock = "/x"', "CDI"),
]

SAME_EITHER_WAY = [
    (QEMU, "disable_block_device_use", ("true", "false")),
    (QEMU, "disable_nesting_checks", ("true", "false")),
    (QEMU, "disable_image_nvdimm", ("true", "false")),
    (QEMU, "use_legacy_serial", ("true", "false")),
    (QEMU, "disable_selinux", ("true", "false")),
    (QEMU, "disable_guest_selinux", ("true", "false")),
    (QEMU, "valid_vhost_user_store_paths", ("[]", '["/x"]')),
    (QEMU, "valid_jailer_paths", ("[]", '["/x"]')),
    (RUNTIME, "disable_guest_empty_dir", ("true", "false")),
    (RUNTIME, "kubelet_root_dir", ('""', '"/var/lib/k"')),
]
"""What both ask for is what is done, as config_refused.py says."""

FACTS = HostFacts(cpus=4, mem_mib=8192, kvm=True, vhost_vsock=False, boot_id="b", kernel_release="6", vhost_net=True)
GIB = 1 << 30


def key_of(text: str) -> str:
    """The last line's key is the one that is tested: those before it are what it needs."""
    return text.splitlines()[-1].partition(" = ")[0]


def keys_of(text: str) -> list[str]:
    return [line.partition(" = ")[0] for line in text.splitlines()]


OWN = ("katapod", "hypervisor.uml")  # tables that upstream does not have


def test_every_key_has_a_row() -> None:
    rows = {(table, key) for table, text, _ in [*EFFECTS, *REFUSALS] for key in keys_of(text)}
    rows |= {(table, key) for table, key, _ in SAME_EITHER_WAY}
    wanted = {(table, key) for table, keys in KEYS.items() for key in keys.split()}
    assert wanted - rows == set(), "a key of upstream's file without a test"
    known = {(table, key) for table, section in SECTIONS.items() for key in section.__struct_fields__}
    known |= {(table, key) for table, keys in REFUSED_KEYS.items() for key in keys}
    assert wanted - known == set(), "a key of upstream's file that is not known"
    acted_upon = {(t, key) for t, section in SECTIONS.items() if t not in OWN for key in section.__struct_fields__}
    assert acted_upon - wanted == set(), (
        "a key that upstream does not have; it belongs into [katapod] or [hypervisor.uml]"
    )


def observe(config: Config) -> str:
    """All that the configuration decides of a sandbox, as text."""
    size = size_for(config, FACTS, (ContainerLimits(),))
    plan = plan_sandbox(
        SandboxRecord("s1", created_at=0.0, supervisor_pid=1, boot_id="", auto_remove=True),
        config,
        FACTS,
        Layout(),
        accelerator=Accelerator.TCG,
        implementation=VirtiofsdImplementation.C,
        size=size,
        hostname="h",
        shm_size_bytes=1,
    )
    plan = structs.replace(plan, vm=structs.replace(plan.vm, uuid="u"))
    template = plan.template.describe() if plan.template else "None"
    disks = [
        plan_disk(Disk("d", Path("/d"), 5, settings=plan.disks)),
        plan_disk(Disk("l", Path("/l"), 6, base=Path("/b"), settings=plan.disks)),
        plan_memory(0, 128, hugepages=plan.vm.hugepages, preallocated=plan.vm.preallocated),
        plan_shared_directory("t", 1, queue_size=plan.virtio_fs_queue_size),
    ]
    pod = size_pod(
        SizeSettings.of(config),
        HostCapacity(cpus=4, memory_mib=8192),
        (),
        announced=ContainerLimits(memory_bytes=GIB),
        static=config.runtime.static_sandbox_resource_mgmt,
    )
    cgroup = plan_cgroup(
        "s1",
        "/pod/c",
        (Hierarchy(Path("/sys/fs/cgroup"), 2, frozenset({"memory"})),),
        sandbox_cgroup_only=config.runtime.sandbox_cgroup_only,
        mem_mib=256,
        beside_mib=128,
    )
    spec = oci.Spec(oci_version="1.0.2", process=oci.Process(args=("a",), cwd="/"), root=oci.Root(path="/"))
    request = RunRequest(
        container_id=ContainerId("c1"),
        image="",
        rootfs=None,
        bundle=Path("/"),
        options=ContainerOptions(),
        remove=True,
        interactive=False,
        accel="",
        labels={},
        stop_signal=None,
    )
    container = asyncio.run(prepare_container(Globals().run_context(), config, request, spec))
    return "\n".join(
        [
            plan.describe(),
            f"template: {template}",
            *(disk.describe() for disk in disks),
            f"more slots: {more_bridge_slots(options_of(plan.vm).bridges)}",
            str(plan.network),
            str(_create_request(plan)),
            f"agent answers within {plan.agent_timeout_s}",
            f"shown to the guest: {' '.join(map(str, plan.bind_mounts))}",
            f"pod of 1 GiB: {pod}",
            cgroup.describe() if cgroup else "",
            f"guest_seccomp={container.guest_seccomp} create_timeout_s={container.create_timeout_s}",
            f"log level: {log_level(config)}",
            f"users: {plan.vm.uids}",
            f"pool: {config.factory.vm_cache_number} machines, {pool_answer(config)}",
            *(annotation(config, name, value) for name, value in ANNOTATED),
            "",
        ]
    )


def log_level(config: Config) -> str:
    root = logging.getLogger()
    before = root.level
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("katapod.model.config.load_config", lambda path: ParsedConfig(config))
            root.setLevel(logging.WARNING)
            Globals().load_config(need_files=False)
        return logging.getLevelName(root.level)
    finally:
        root.setLevel(before)


def pool_answer(config: Config) -> str:
    """That its server has so many machines is seen in tests/e2e/test_pool.py."""
    try:
        return str(end_pool(config))
    except KatapodError as error:
        return str(error)


ANNOTATED = (("kernel_params", "x=1"), ("path", "/q"), ("virtio_fs_daemon", "/v"), ("entropy_source", "/e"))


def annotation(config: Config, name: str, value: str) -> str:
    annotations = {f"io.katacontainers.config.hypervisor.{name}": value}
    try:
        apply_annotations(config, annotations, host_cpus=4, expand=lambda pattern: [pattern])
    except ConfigError:
        return f"annotation {name}: no"
    return f"annotation {name}: ok"


@pytest.fixture(autouse=True)
def files_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "file_identity", str)


def config_with(table: str, text: str) -> Config:
    parsed = parse_config(f"[{table}]\n{text}\n".encode())
    assert parsed.problems == ()
    return parsed.config


@pytest.mark.parametrize(("table", "text", "seen"), EFFECTS)
def test_what_a_key_changes(table: str, text: str, seen: str) -> None:
    before, after = observe(Config()), observe(config_with(table, text))
    old, new = before.splitlines(), after.splitlines()
    delta = [line for line in new if line not in old] + [f"-{line.strip()}" for line in old if line not in new]
    assert delta, "nothing has changed"
    assert seen in "\n".join(delta) + "\n"
    if "\n" in text and table == QEMU and not key_of(text).startswith("valid_"):
        # the last line has an effect of its own
        others = "\n".join(text.splitlines()[:-1])
        assert after != observe(config_with(table, others))


@pytest.mark.parametrize(("table", "text", "reason"), REFUSALS)
def test_what_is_refused_and_why(table: str, text: str, reason: str) -> None:
    (problem,) = judge_config(f"[{table}]\n{text}\n".encode(), "c.toml").problems
    assert problem.severity == "refused"
    assert problem.key == f"[{table}] {key_of(text)}"
    assert problem.where == "c.toml:2"
    assert problem.message.startswith("not supported: ")
    assert reason in problem.message
    assert re.search(r"; (remove it or set it to|use) ", problem.message)
    with pytest.raises(ConfigError, match=key_of(text)):
        parse_config(f"[{table}]\n{text}\n".encode())


@pytest.mark.parametrize(("table", "key", "values"), SAME_EITHER_WAY)
def test_what_is_the_same_either_way(table: str, key: str, values: tuple[str, str]) -> None:
    assert {config_with(table, f"{key} = {value}") for value in values} == {Config()}


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, keys in REFUSED_KEYS.items() for name in keys])
def test_refused_keys_have_a_reason_and_neutral_values_of_their_type(table: str, name: str) -> None:
    key: Any = REFUSED_KEYS[table][name]
    assert key.why
    for value in key.neutral:
        assert msgspec.convert(value, type=key.kind) == value
