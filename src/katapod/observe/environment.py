"""What `kata-runtime env` shows: this program, its configuration and this host, with upstream's names and order.

Netmon, TraceMode and the like are of older formats. Values that do not exist here are the empty ones of their type.
"""

import os
import platform
import subprocess
import sys
from typing import Any

from katapod import __version__
from katapod.model.config import BUILT_IN, ParsedConfig, find_virtiofsd
from katapod.observe.procfs import first_cpu, kib_of, read_pairs
from katapod.version import OCI_VERSION, commit, version_parts

__all__ = ["FORMAT_VERSION", "collect_environment", "render_toml"]

FORMAT_VERSION = "1.0.27"
UNKNOWN = "<<unknown>>"
GO_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}
VERSION_LIMIT_S = 5.0
CPU_FLAGS = {"GenuineIntel": ("vmx", "lm", "sse4_1"), "AuthenticAMD": ("svm", "lm", "sse4_1")}

Tree = dict[str, Any]


def collect_environment(parsed: ParsedConfig, kernel_params: str, program: str) -> Tree:
    """Tables in the order of the walkthrough; keys of newer formats stand behind those that it shows.

    `kernel_params` is the guest kernel's command line, `program` the VMM's."""
    config = parsed.config
    qemu, runtime = config.qemu, config.runtime
    is_uml = program == config.uml.kernel  # which is its own VMM
    return {
        "Meta": {"Version": FORMAT_VERSION},
        "Runtime": {
            "Debug": runtime.enable_debug,
            "Trace": False,
            "DisableGuestSeccomp": runtime.disable_guest_seccomp,
            "DisableNewNetNs": False,
            "SandboxCgroupOnly": runtime.sandbox_cgroup_only,
            "Path": os.path.realpath(sys.argv[0]),
            "GuestSeLinuxLabel": "",
            "Version": {"OCI": OCI_VERSION, "Version": _own_version()},
            "Config": {"Path": "" if parsed.source == BUILT_IN else os.path.realpath(parsed.source)},
        },
        "Hypervisor": {
            "MachineType": qemu.machine_type,
            "Version": _version_of(program),
            "Path": program,
            "BlockDeviceDriver": "virtio-blk",
            "EntropySource": qemu.entropy_source,
            "SharedFS": qemu.shared_fs,
            "VirtioFSDaemon": find_virtiofsd(qemu.virtio_fs_daemon),
            "SocketPath": "" if os.geteuid() == 0 else UNKNOWN,
            "Msize9p": 0,
            "MemorySlots": qemu.memory_slots,
            "HotPlugVFIO": "no-port",
            "ColdPlugVFIO": "no-port",
            "PCIeRootPort": qemu.pcie_root_port,
            "PCIeSwitchPort": 0,
            "HotplugVFIOOnRootBus": False,
            "Debug": qemu.enable_debug,
            "SecurityInfo": {
                "Rootless": False,
                "DisableSeccomp": not qemu.seccompsandbox,
                "GuestHookPath": qemu.guest_hook_path,
                "EnableAnnotations": list(qemu.enable_annotations),
                "ConfidentialGuest": False,
            },
        },
        "Image": {"Path": os.path.realpath(config.uml.image) if is_uml else qemu.image},
        "Kernel": {
            "Path": os.path.realpath(config.uml.kernel if is_uml else qemu.kernel),
            "Parameters": kernel_params,
        },
        "Initrd": {"Path": "" if is_uml else os.path.realpath(qemu.initrd)},
        "Agent": {"Debug": config.agent.enable_debug, "Trace": False, "TraceMode": "", "TraceType": ""},
        "Host": _host(),
        # the program that watched a pod's network in Kata 1.x: the sandbox's supervisor does it now
        "Netmon": {"Path": "", "Debug": False, "Enable": False, "Version": _own_version()},
    }


def _own_version() -> Tree:
    major, minor, patch = version_parts()
    return {"Semver": __version__, "Major": major, "Minor": minor, "Patch": patch, "Commit": commit()}


def _version_of(program: str) -> str:
    try:
        answer = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=VERSION_LIMIT_S, check=True
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return UNKNOWN
    return answer.stdout.strip() or UNKNOWN


def _host() -> Tree:
    machine = platform.machine()
    cpu = first_cpu()
    memory = read_pairs("/proc/meminfo", ":")
    distro = read_pairs("/etc/os-release", "=") or read_pairs("/usr/lib/os-release", "=")
    vendor = cpu.get("vendor_id", "")
    flags = cpu.get("flags", "").split()
    return {
        "AvailableGuestProtections": ["noProtection"],
        "Kernel": os.uname().release,
        "Architecture": GO_NAMES.get(machine, machine),
        "VMContainerCapable": _capable(vendor, flags),
        "SupportVSocks": os.path.exists("/dev/vhost-vsock"),
        "Distro": {
            "Name": distro.get("NAME", UNKNOWN).strip('"'),
            "Version": distro.get("VERSION_ID", UNKNOWN).strip('"'),
        },
        "CPU": {"Vendor": vendor, "Model": cpu.get("model name", ""), "CPUs": os.cpu_count() or 1},
        "Memory": {
            "Total": kib_of(memory, "MemTotal"),
            "Free": kib_of(memory, "MemFree"),
            "Available": kib_of(memory, "MemAvailable"),
        },
    }


def _capable(vendor: str, flags: list[str]) -> bool:
    """Whether the CPU can virtualise and the host's kernel offers it; without, guests are emulated."""
    wanted = CPU_FLAGS.get(vendor)
    return wanted is not None and all(flag in flags for flag in wanted) and os.path.exists("/dev/kvm")


def render_toml(tree: Tree) -> str:
    """Tables below tables, indented as upstream does."""
    from katapod.model.config_text import toml_value

    lines: list[str] = []

    def write(table: Tree, path: str, depth: int) -> None:
        pad = "  " * depth
        lines.append(f"{pad}[{path}]")
        lines.extend(
            f"{pad}  {key} = {toml_value(value)}" for key, value in table.items() if not isinstance(value, dict)
        )
        for key, value in table.items():
            if isinstance(value, dict):
                lines.append("")
                write(value, f"{path}.{key}", depth + 1)

    for number, (name, table) in enumerate(tree.items()):
        if number:
            lines.append("")
        write(table, name, 0)
    return "\n".join(lines) + "\n"
