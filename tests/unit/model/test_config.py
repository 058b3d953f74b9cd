"""configuration.toml."""

from collections.abc import Callable
from pathlib import Path

import pytest

from katapod.model import config as model
from katapod.model.config import Config, ParsedConfig, check_paths, judge_config, load_config, parse_config
from katapod.model.config_refused import OBSOLETE_KEYS, REFUSED_KEYS
from katapod.model.config_text import render_config
from katapod.model.errors import ConfigError, MissingProgram

UPSTREAM = """
[hypervisor.qemu]
path = "/usr/bin/qemu-system-x86_64"
kernel = "/usr/share/kata-containers/vmlinux.container"
initrd = "/usr/share/kata-containers/kata-containers-initrd.img"
machine_type = "q35"
rootless = false
enable_annotations = ["enable_iommu", "kernel_params", "kernel_verity_params"]
valid_hypervisor_paths = ["/usr/bin/qemu-system-x86_64"]
kernel_params = "cgroup_no_v1=all systemd.unified_cgroup_hierarchy=1"
firmware = ""
firmware_volume = ""
machine_accelerators = ""
seccompsandbox = ""
cpu_features = "pmu=off"
default_vcpus = 1
default_maxvcpus = 0
default_bridges = 1
default_memory = 2048
memory_slots = 10
default_maxmemory = 0
memory_offset = 0
enable_virtio_mem = false
disable_block_device_use = true
shared_fs = "virtio-fs"
virtio_fs_daemon = "/usr/libexec/virtiofsd"
valid_virtio_fs_daemon_paths = ["/usr/libexec/virtiofsd"]
virtio_fs_cache_size = 0
virtio_fs_queue_size = 1024
virtio_fs_extra_args = ["--thread-pool-size=1", "--announce-submounts"]
virtio_fs_cache = "auto"
block_device_driver = "virtio-scsi"
block_device_aio = "io_uring"
enable_iothreads = false
vhost_user_store_path = "/var/run/kata-containers/vhost-user"
valid_vhost_user_store_paths = ["/var/run/kata-containers/vhost-user"]
numa_mapping = []
msize_9p = 8192
hot_plug_vfio = "no-port"
cold_plug_vfio = "no-port"
entropy_source = "/dev/urandom"
valid_entropy_sources = ["/dev/urandom", "/dev/random", ""]
disable_guest_selinux = true

[factory]
enable_template = false
template_path = "/run/vc/vm/template"
vm_cache_number = 0
vm_cache_endpoint = "/var/run/kata-containers/cache.sock"

[agent.kata]
kernel_modules = []
dial_timeout = 45
cdh_api_timeout = 50

[runtime]
internetworking_model = "tcfilter"
disable_guest_seccomp = true
guest_selinux_label = ""
vfio_mode = "guest-kernel"
disable_guest_empty_dir = true
emptydir_mode = "shared-fs"
sandbox_cgroup_only = false
static_sandbox_resource_mgmt = false
sandbox_bind_mounts = []
experimental = []
create_container_timeout = 60
dan_conf = "/run/kata-containers/dans"
kubelet_root_dir = "/var/lib/kubelet"
pod_resource_api_sock = ""
"""


def parse(text: str) -> ParsedConfig:
    return parse_config(text.encode(), "c.toml")


def qemu(line: str) -> ParsedConfig:
    return parse(f"[hypervisor.qemu]\n{line}\n")


def test_upstreams_shipped_values_raise_no_problem() -> None:
    parsed = parse(UPSTREAM)
    assert parsed.problems == ()
    assert parsed.source == "c.toml"
    assert parsed.config.qemu.kernel_params == "cgroup_no_v1=all systemd.unified_cgroup_hierarchy=1"
    assert parsed.config.qemu.virtio_fs_extra_args == ("--thread-pool-size=1", "--announce-submounts")
    assert parsed.config.qemu.seccompsandbox == ""
    assert parsed.config.runtime.disable_guest_seccomp is True


def test_an_empty_file_is_the_defaults() -> None:
    assert parse("") == ParsedConfig(Config(), (), "c.toml")
    assert Config().qemu.kernel == "/var/cache/kata-containers/vmlinuz.container"
    assert Config().qemu.initrd == "/var/cache/kata-containers/kata-containers-initrd.img"
    assert Config().katapod.accelerator == "auto"
    assert Config().katapod.rootfs == "disk"


def test_values_are_taken() -> None:
    parsed = parse(
        """
        [hypervisor.qemu]
        default_vcpus = 1.5
        default_memory = 512
        enable_debug = true
        [agent.kata]
        debug_console_enabled = true
        kernel_modules = ["overlay metacopy=on"]
        [runtime]
        create_container_timeout = 90
        [katapod]
        accelerator = "tcg"
        rootfs = "virtio-fs"
        guest_base_memory = 256
        console_log_kib = 64
        """
    )
    assert parsed.problems == ()
    assert parsed.config.qemu.default_vcpus == 1.5
    assert parsed.config.qemu.default_memory == 512
    assert parsed.config.qemu.enable_debug
    assert parsed.config.agent.debug_console_enabled
    assert parsed.config.agent.kernel_modules == ("overlay metacopy=on",)
    assert parsed.config.runtime.create_container_timeout == 90
    assert parsed.config.katapod == model.KatapodConfig(
        accelerator="tcg", rootfs="virtio-fs", guest_base_memory=256, console_log_kib=64
    )


@pytest.mark.parametrize(
    "line",
    ['path = ""', 'kernel = ""', 'image = ""', "default_vcpus = 0", "default_memory = 0", "virtio_fs_queue_size = 0"],
)
def test_empty_and_zero_mean_the_default(line: str) -> None:
    parsed = qemu(line)
    assert (parsed.config, parsed.problems) == (Config(), ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[hypervisor.qemu]\ndefault_vcpus = "two"', "[hypervisor.qemu] default_vcpus: expected float, got str 'two'"),
        ("[hypervisor.qemu]\ndefault_memory = 1.5", "default_memory: expected int, got float 1.5"),
        ("[hypervisor.qemu]\ndefault_memory = true", "default_memory: expected int, got bool True"),
        ("[hypervisor.qemu]\ndefault_memory = -1", "default_memory: expected int >= 0, got int -1"),
        ("[hypervisor.qemu]\nenable_debug = 1", "enable_debug: expected bool, got int 1"),
        ('[hypervisor.qemu]\nvirtio_fs_extra_args = "-x"', "virtio_fs_extra_args: expected array, got str '-x'"),
        ("[hypervisor.qemu]\nvirtio_fs_extra_args = [1]", "virtio_fs_extra_args: expected str, got int, at [0]"),
        ('[hypervisor.qemu]\nvirtio_fs_cache = "some"', "'some' is not one of never, metadata, auto, always"),
        ("[hypervisor.qemu]\nvirtio_fs_cache = 3", "virtio_fs_cache: expected str, got int 3"),
        ("[hypervisor.qemu]\nvirtio_fs_queue_size = 1000", "virtio_fs_queue_size: 1000 is not a power of two"),
        (
            '[hypervisor.qemu]\nimage = "/a.img"',
            "image: not supported: the guest is a kernel and an initrd",
        ),
        ('[hypervisor.qemu]\nmachine_type = "pc"', "machine_type: not supported: only q35 has"),
        (
            '[hypervisor.qemu]\nshared_fs = "virtio-9p"',
            "shared_fs: not supported: files reach the guest by",
        ),
        ("[hypervisor.qemu]\nvirtio_fs_cache_size = 1024", "virtio_fs_cache_size: not supported: neither QEMU's"),
        ('[hypervisor.qemu]\nkernel = "vmlinuz"', "kernel: 'vmlinuz' is not an absolute path"),
        ('[hypervisor.qemu]\nkernel_params = "a\\nb"', "has a control character"),
        ("[hypervisor.qemu]\nrootless = 1", "rootless: expected bool, got int 1"),
        ("[hypervisor.qemu]\ndefault_memroy = 1", "default_memroy: unknown key; did you mean default_memory?"),
        ("[hypervisor.qemu]\nxyzzy = 1", "[hypervisor.qemu] xyzzy: unknown key"),
        ("[hypervisor.qemu.factory]\nenable_tmplate = true", "[hypervisor.qemu.factory] enable_tmplate: unknown key"),
        ('[hypervisor.clh]\npath = "/x"', "[hypervisor.clh]: not supported: the hypervisor is QEMU"),
        ('[hypervisor]\npath = "/x"', "[hypervisor] path: unknown key"),
        ("[agent.other]\nx = 1", "[agent.other]: unknown table; the tables are [agent.kata], [factory]"),
        ("[katapod]\ntemplates = true", "[katapod] templates: unknown key"),
        ('[katapod]\nrootfs = "nfs"', "'nfs' is not one of disk, virtio-fs"),
        ('[katapod]\naccelerator = "hvf"', "'hvf' is not one of auto, kvm, uml, tcg"),
        ("[katapod]\nguest_base_memory = 1", "guest_base_memory: expected int >= 64, got int 1"),
        ("debug = true", "debug: unknown key outside of a table"),
        ("[runtime\n", "cannot parse c.toml: it is not TOML: "),
        ("a = 1\na = 2", "cannot parse c.toml: it is not TOML: "),
    ],
)
def test_errors_name_file_key_and_value(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert "c.toml" in str(caught.value)


def test_all_errors_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse('[hypervisor.qemu]\nkernel = 1\n[runtime]\nenable_debug = "x"\n')
    assert len(str(caught.value).splitlines()) == 2


def test_a_file_that_is_not_text() -> None:
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        parse_config(b"\xff\xfe", "c.toml")


def test_a_key_that_is_not_honoured_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        qemu("enable_numa = true")
    assert str(caught.value) == (
        "c.toml:2: [hypervisor.qemu] enable_numa: not supported: the guest has one NUMA node; "
        "remove it or set it to false"
    )


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[hypervisor.qemu]\nuse_vsock = true", "[hypervisor.qemu] use_vsock"),
        ('[proxy.kata]\npath = "/x"', "[proxy.kata]"),
        ("[netmon]\nenable = true", "[netmon]"),
    ],
)
def test_obsolete_keys_stop_nothing(text: str, key: str) -> None:
    (problem,) = parse(text).problems
    assert (problem.severity, problem.key) == ("obsolete", key)


def test_too_little_memory_is_replaced_with_a_warning() -> None:
    parsed = qemu("default_memory = 128")
    assert parsed.config.qemu.default_memory == 2048
    assert parsed.problems[0].severity == "warning"
    assert "128 MiB is less than a guest needs (256 MiB), 2048 is used" in str(parsed.problems[0])
    assert qemu("default_memory = 256").config.qemu.default_memory == 256


def test_drop_ins_replace_single_keys_in_order() -> None:
    parsed = parse_config(
        b'[hypervisor.qemu]\ndefault_memory = 512\nkernel_params = "a"\nenable_numa = true\n',
        "main",
        [
            ("10", b"[hypervisor.qemu]\ndefault_memory = 1024\n"),
            ("20", b"[hypervisor.qemu]\ndefault_memory = 4096\nenable_numa = false\n"),
        ],
    )
    assert parsed.config.qemu.default_memory == 4096
    assert parsed.config.qemu.kernel_params == "a"
    assert parsed.problems == ()
    with pytest.raises(ConfigError, match=r"^10:2: \[runtime\] enable_debug: expected bool"):
        parse_config(b"", "main", [("10", b"[runtime]\nenable_debug = 1\n")])


def test_no_key_is_both_acted_upon_and_unused() -> None:
    sections = {"hypervisor.qemu": model.QemuConfig, "agent.kata": model.AgentConfig, "runtime": model.RuntimeConfig}
    for table, section in sections.items():
        used = set(section.__struct_fields__)
        assert used.isdisjoint(REFUSED_KEYS[table])
        assert set(OBSOLETE_KEYS[table]).isdisjoint(used | set(REFUSED_KEYS[table]))


def there(*paths: str) -> Callable[[str], bool]:
    return lambda path: path in paths


QEMU = "/usr/bin/qemu-system-x86_64"
KERNEL, INITRD = Config().qemu.kernel, Config().qemu.initrd


@pytest.mark.parametrize("daemon", model.VIRTIOFSD_PATHS)
def test_the_first_virtiofsd_that_exists_is_chosen(daemon: str) -> None:
    found = check_paths(ParsedConfig(Config()), there(QEMU, KERNEL, INITRD, daemon, "/usr/bin/virtiofsd"))
    assert found.qemu.virtio_fs_daemon == daemon
    assert found.runtime == Config().runtime


def test_a_configured_virtiofsd_is_not_replaced() -> None:
    parsed = qemu('virtio_fs_daemon = "/opt/virtiofsd"')
    with pytest.raises(MissingProgram, match="cannot find virtiofsd: no file /opt/virtiofsd"):
        check_paths(parsed, there(QEMU, KERNEL, INITRD, "/usr/libexec/virtiofsd"))


@pytest.mark.parametrize(
    ("missing", "kind", "message"),
    [
        (
            QEMU,
            MissingProgram,
            r"cannot find QEMU: no file /usr/bin/qemu-system-x86_64 \(\[hypervisor.qemu\] path, built",
        ),
        ("/usr/libexec/virtiofsd", MissingProgram, "cannot find virtiofsd: no file /usr/libexec/virtiofsd or /usr/lib"),
        (KERNEL, ConfigError, f"cannot use the guest kernel {KERNEL}: no such file"),
        (INITRD, ConfigError, f"cannot use the guest initrd {INITRD}: no such file"),
    ],
)
def test_missing_files_are_named_with_a_hint(missing: str, kind: type[ConfigError], message: str) -> None:
    paths = {QEMU, KERNEL, INITRD, "/usr/libexec/virtiofsd"} - {missing}
    with pytest.raises(kind, match=message) as caught:
        check_paths(ParsedConfig(Config()), there(*paths))
    assert caught.value.hint


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The two default paths, moved below a temporary directory."""
    paths = (tmp_path / "etc" / "configuration.toml", tmp_path / "usr" / "configuration.toml")
    for path in paths:
        path.parent.mkdir()
    monkeypatch.setattr(model, "CONFIG_PATHS", tuple(str(path) for path in paths))
    return paths


def test_the_first_default_file_wins(search: tuple[Path, Path]) -> None:
    etc, usr = search
    assert load_config(None, {}) == ParsedConfig(Config())
    usr.write_text("[runtime]\nenable_debug = true\n")
    assert load_config(None, {}).config.runtime.enable_debug
    etc.write_text("")
    found = load_config(None, {})
    assert (found.config, found.source) == (Config(), str(etc))


def test_an_explicit_file_wins(search: tuple[Path, Path], tmp_path: Path) -> None:
    search[0].write_text("nonsense")
    mine = tmp_path / "mine.toml"
    mine.write_text("[runtime]\nenable_debug = true\n")
    assert load_config(mine, {"KATA_CONF_FILE": "/nowhere"}).source == str(mine)
    with pytest.raises(ConfigError, match=r"cannot read .*absent: No such file"):
        load_config(tmp_path / "absent", {})


def test_drop_ins_lie_beside_the_resolved_file(search: tuple[Path, Path], tmp_path: Path) -> None:
    etc, usr = search
    usr.write_text("[runtime]\nenable_debug = true\n")
    etc.symlink_to(usr)
    drop_in = usr.parent / "config.d" / "10-memory.toml"
    drop_in.parent.mkdir()
    drop_in.write_text("[hypervisor.qemu]\ndefault_memory = 512\n")
    found = load_config(None, {}).config
    assert (found.runtime.enable_debug, found.qemu.default_memory) == (True, 512)
    drop_in.write_text("[hypervisor.qemu]\ndefault_memory = 'x'\n")
    with pytest.raises(ConfigError, match=r"10-memory\.toml:\d: \[hypervisor.qemu\] default_memory"):
        load_config(None, {})


def test_the_environment_may_only_name_a_default_file(search: tuple[Path, Path], tmp_path: Path) -> None:
    etc, usr = search
    etc.write_text("")
    usr.write_text("[runtime]\nenable_debug = true\n")
    assert load_config(None, {"KATA_CONF_FILE": str(usr)}).config.runtime.enable_debug
    other = tmp_path / "other.toml"
    other.write_text("")
    with pytest.raises(ConfigError, match="cannot use KATA_CONF_FILE="):
        load_config(None, {"KATA_CONF_FILE": str(other)})


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("# [runtime]\n[agent.kata]\nenable_debug = true\n[runtime]\n enable_debug = 1", 5),
        ("[runtime]\nenable_debugs = 1", 2),
        ('[hypervisor.qemu]\n"rootless" = true', 2),
        ("\n[hypervisor.clh]\npath = 1", 2),
        ("runtime = {enable_debug = 1}", 0),
    ],
)
def test_the_line_is_named_where_it_is_found(text: str, line: int) -> None:
    (problem,) = judge_config(text.encode(), "c.toml").problems
    assert problem.where == (f"c.toml:{line}" if line else "c.toml")


def test_the_rust_runtimes_form_is_read_as_the_other() -> None:
    parsed = parse(
        """
        [hypervisor.qemu]
        seccomp_sandbox = "on"
        block_device_driver = "virtio-blk-pci"
        hotplug_vfio_on_root_bus = false
        queue_size = 128
        [hypervisor.qemu.factory]
        enable_template = false
        template_path = "/t"
        [agent.kata]
        create_container_timeout = 30
        log_level = "debug"
        dial_timeout_ms = 10
        reconnect_timeout_ms = 3000
        mem_agent = {mem_agent_enable = false}
        [runtime]
        name = "virt_container"
        hypervisor_name = "qemu"
        log_level = "info"
        """
    )
    assert parsed.problems == ()
    assert parsed.config.qemu.seccompsandbox == "on"
    assert parsed.config.factory == model.FactoryConfig(enable_template=False, template_path="/t")
    assert parsed.config.runtime == model.RuntimeConfig(create_container_timeout=30)
    assert parsed.config.agent == model.AgentConfig(enable_debug=True)


def test_refusals_of_the_rust_runtimes_form_name_its_own_key() -> None:
    with pytest.raises(ConfigError, match=r"c.toml:2: \[hypervisor.qemu\] selinux_label: not supported"):
        qemu('selinux_label = "a:b:c"')


def test_where_each_value_comes_from() -> None:
    parsed = parse_config(
        b"[hypervisor.qemu]\ndefault_memory = 512\ndefault_vcpus = 2\n",
        "main",
        [("10", b"[hypervisor.qemu]\ndefault_memory = 1024\n")],
    )
    text = render_config(parsed)
    assert "default_memory = 1024  # 10\n" in text
    assert "default_vcpus = 2.0  # main\n" in text
    assert "memory_slots = 10  # default\n" in text
    assert parse_config(text.encode()).config == parsed.config
    assert parse_config(render_config(ParsedConfig(Config())).encode()).config == Config()
