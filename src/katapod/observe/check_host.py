"""Collect what `kata-runtime check` judges: this machine and what is installed on it. Changes nothing.

The guest image and the accelerator's verdict belong to other rooms; the caller adds them.
"""

import errno
import os
import re
import resource
import shutil
from pathlib import Path

from katapod.host.cgroup import host_cgroup_version, host_hierarchies
from katapod.host.cni import load_networks
from katapod.host.facts import HostFacts
from katapod.host.process import run
from katapod.model.config import VIRTIOFSD_PATHS, Config, find_virtiofsd
from katapod.model.errors import KatapodError
from katapod.model.layout import Layout
from katapod.model.uid_range import parse_uid_range
from katapod.observe.check_engines import collect_engines, find_shim
from katapod.observe.check_facts import (
    AcceleratorFacts,
    CheckFacts,
    DeviceFacts,
    ImageFacts,
    ModuleState,
    ProgramFacts,
    RungFacts,
    SpaceFacts,
)
from katapod.observe.check_machine import BRIDGE_PLUGINS, MORE_PLUGINS
from katapod.observe.check_software import PROGRAMS
from katapod.observe.check_trials import try_jail, try_network, try_overlay
from katapod.observe.procfs import first_cpu, kib_of, read_pairs
from katapod.tasks import together

__all__ = ["collect_check_facts", "file_problem"]

VERSION_LIMIT_S = 10.0
DEVICES = (  # the first is judged on its own
    ("/dev/kvm", "kvm"),
    ("/dev/vhost-vsock", "vhost_vsock"),
    ("/dev/vhost-net", "vhost_net"),
    ("/dev/net/tun", "tun"),
)
CAPABILITIES = {  # linux/capability.h
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
    "CAP_MKNOD": 27,
}
VERSION_FLAGS = {"ip": "-V", "tc": "-V", "mke2fs": "-V", "busybox": "--help"}


async def collect_check_facts(
    config: Config,
    host: HostFacts,
    layout: Layout,
    image: ImageFacts,
    accelerators: tuple[AcceleratorFacts, RungFacts, RungFacts],  # what is chosen, KVM, User-mode Linux
    *,
    configuration: str,
    configuration_error: str,
) -> CheckFacts:
    cpu = first_cpu()
    available_mib = kib_of(read_pairs("/proc/meminfo", ":"), "MemAvailable") >> 10
    hierarchies = host_hierarchies()
    controllers = frozenset(name for each in hierarchies for name in each.controllers)
    programs, network, engines = await together(_programs(config), try_network(), collect_engines())
    plugin_path = ":".join(config.katapod.cni_plugin_dirs)
    networks, problems = load_networks(Path(config.katapod.cni_conf_dir))
    spaces = {"state": layout.state_root, "data": layout.image_root, "cache": layout.guest_image_root}
    if config.factory.enable_template:
        spaces["templates"] = Path(config.factory.template_path)
    return CheckFacts(
        root=os.geteuid() == 0,
        architecture=os.uname().machine,
        cpu_vendor=cpu.get("vendor_id", ""),
        cpu_flags=frozenset(cpu.get("flags", "").split()),
        cpus=host.cpus,
        kernel_release=host.kernel_release,
        devices=tuple(_device(path, module, host) for path, module in DEVICES),
        configuration=configuration,
        configuration_error=configuration_error,
        programs=programs,
        image=image,
        accelerator=accelerators[0],
        kvm=accelerators[1],
        uml=accelerators[2],
        cgroup_version=host_cgroup_version() if hierarchies else 0,
        cgroup_controllers=controllers,
        cgroup_writable=any(os.access(each.mount, os.W_OK) for each in hierarchies),
        trials={**network, "overlay": try_overlay(), "jail": await try_jail(parse_uid_range(config.katapod.jail_uids))},
        cni_plugins={name: shutil.which(name, path=plugin_path) or "" for name in (*BRIDGE_PLUGINS, *MORE_PLUGINS)},
        cni_dirs=config.katapod.cni_plugin_dirs,
        cni_networks=tuple(network.name for network in networks),
        cni_problems=tuple(str(problem) for problem in problems),
        mem_mib=host.mem_mib,
        mem_available_mib=available_mib,
        default_memory_mib=config.qemu.default_memory,
        spaces={key: _space(path) for key, path in spaces.items()},
        capabilities=_capabilities(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        shim=find_shim(),
        engines=engines,
    )


def _device(path: str, module: str, host: HostFacts) -> DeviceFacts:
    error = file_problem(path, os.R_OK | os.W_OK)
    if path == "/dev/kvm" and not error and not host.kvm:
        error = "opens, but does not answer as KVM does"
    return DeviceFacts(path, error, module, _module_state(module, host.kernel_release))


def file_problem(path: str | Path, rights: int = os.R_OK) -> str:
    """Why `path` cannot be used; empty if it can. A link that leads nowhere is said to be one."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"a link to {os.readlink(path)}, which is not there"
    if not os.path.exists(path):
        return os.strerror(errno.ENOENT)
    return "" if os.access(path, rights) else os.strerror(errno.EACCES)


def _module_state(name: str, release: str) -> ModuleState:
    if Path("/sys/module", name).exists():
        return ModuleState.LOADED
    directory = Path("/lib/modules", release)
    pattern = re.compile(rf"(^|/){name.replace('_', '[-_]')}\.ko", re.MULTILINE)
    for index, state in (("modules.builtin", ModuleState.LOADED), ("modules.dep", ModuleState.LOADABLE)):
        try:
            text = (directory / index).read_text()
        except OSError:
            continue
        if pattern.search(text):
            return state
    return ModuleState.ABSENT


async def _programs(config: Config) -> tuple[ProgramFacts, ...]:
    """QEMU first, then those of PROGRAMS, in its order."""
    path = config.qemu.path
    virtiofsd = find_virtiofsd(config.qemu.virtio_fs_daemon)
    wanted = {"qemu": path, "virtiofsd": virtiofsd or " or ".join(VIRTIOFSD_PATHS)}
    found = {name: shutil.which(place) or "" for name, place in wanted.items()}
    for name in PROGRAMS:
        if name not in found:
            found[name] = shutil.which(name) or ""
    found["iptables"] = shutil.which("/usr/sbin/iptables") or ""
    wanted["iptables"] = "/usr/sbin/iptables"
    versions = await together(*(_version(name, place) for name, place in found.items()))
    return tuple(
        ProgramFacts(name, place or wanted.get(name, ""), bool(place), version)
        for (name, place), version in zip(found.items(), versions, strict=True)
    )


async def _version(name: str, path: str) -> str:
    """The line in which the program says its version; empty for one that does not, or is not there."""
    if not path or name in ("depmod", "dracut"):  # dracut is a shell script, and slow
        return ""
    try:
        done = await run([path, VERSION_FLAGS.get(name, "--version")], timeout_s=VERSION_LIMIT_S, check=False)
    except KatapodError:
        return ""
    lines = (line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines())
    return next((line[:120] for line in lines if re.search(r"\d+\.\d+|iproute2-", line)), "")


def _space(path: Path) -> SpaceFacts:
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        stat = os.statvfs(existing)
        kind = _fs_type(existing)
    except OSError as exc:
        return SpaceFacts(str(path), 0, "", exc.strerror or str(exc))
    return SpaceFacts(str(path), stat.f_bavail * stat.f_frsize >> 20, kind)


def _fs_type(path: Path) -> str:
    """Of the mount that `path` is on, by its device. Source: proc(5), mountinfo."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == wanted:
            return rest.split()[0]
    return "unknown"


def _capabilities() -> frozenset[str]:
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    bits = int(match[1], 16) if match else 0
    return frozenset(name for name, bit in CAPABILITIES.items() if bits >> bit & 1)
