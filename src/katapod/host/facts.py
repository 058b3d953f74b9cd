"""What this machine has: collected once, passed to the pure plans."""

import contextlib
import fcntl
import os
import random
import socket
import struct
from pathlib import Path

from msgspec import Struct

from katapod.host.hints import hint_for
from katapod.host.process import run
from katapod.model.errors import DeviceMissing
from katapod.plan.virtiofsd import VirtiofsdImplementation, parse_implementation

__all__ = [
    "HostFacts",
    "boot_time",
    "claim_vsock_cid",
    "collect_host_facts",
    "cpu_identity",
    "cpu_vendor",
    "file_identity",
    "host_tsc_khz",
    "kvm_settings",
    "version_words",
    "virtiofsd_implementation",
]

KVM_GET_API_VERSION = 0xAE00  # linux/kvm.h
VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60  # linux/vhost.h
CID_MAX = 0xFFFFFFFE
VERSION_LIMIT_S = 10.0
KVM_PARAMETERS = (
    "kvm.ignore_msrs",
    "kvm.enable_pmu",
    "kvm_intel.ept",
    "kvm_intel.nested",
    "kvm_intel.unrestricted_guest",
    "kvm_amd.npt",
    "kvm_amd.nested",
)


class HostFacts(Struct, frozen=True):
    cpus: int
    mem_mib: int
    kvm: bool  # /dev/kvm opens and answers; whether guests boot under it is another question
    vhost_vsock: bool
    boot_id: str
    kernel_release: str
    vhost_net: bool = False


def collect_host_facts() -> HostFacts:
    return HostFacts(
        cpus=len(os.sched_getaffinity(0)),
        mem_mib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        kvm=_kvm_answers(),
        vhost_vsock=os.access("/dev/vhost-vsock", os.R_OK | os.W_OK) and hasattr(socket, "AF_VSOCK"),
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        kernel_release=os.uname().release,
        vhost_net=os.access("/dev/vhost-net", os.R_OK | os.W_OK),
    )


def _kvm_answers() -> bool:
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return fcntl.ioctl(fd, KVM_GET_API_VERSION) == 12
    except OSError:
        return False
    finally:
        os.close(fd)


def boot_time() -> float:
    """When this host was started, seconds since the epoch. Source: proc(5), /proc/stat."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("btime "):
            return float(line.split()[1])
    return 0.0


def cpu_identity() -> str:
    """What a guest under KVM may come to depend on: model, microcode and features of the first CPU."""
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    kept = ("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags")
    return "\n".join(line for line in first.splitlines() if line.partition("\t")[0].partition(":")[0].strip() in kept)


def parse_tsc_khz(cpuinfo: str) -> int:
    """Frequency of the time stamp counter, kHz, from /proc/cpuinfo; 0 if that does not tell it.

    Where the counter has a constant rate, BogoMIPS are computed from it: two for each MHz. Source: the kernel's
    init/calibrate.c, arch/x86/kernel/tsc.c (lpj_fine).
    """
    first = dict(line.partition(":")[::2] for line in cpuinfo.partition("\n\n")[0].splitlines())
    found = {name.strip(): value.strip() for name, value in first.items()}
    if not {"constant_tsc", "nonstop_tsc"} <= set(found.get("flags", "").split()):
        return 0
    try:
        return round(float(found["bogomips"]) * 500)
    except (KeyError, ValueError):
        return 0


def host_tsc_khz() -> int:
    return parse_tsc_khz(Path("/proc/cpuinfo").read_text())


def cpu_vendor() -> str:
    """As /proc/cpuinfo has it: GenuineIntel, AuthenticAMD, ...; empty if it does not say."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("vendor_id"):
            return line.partition(":")[2].strip()
    return ""


def kvm_settings() -> str:
    """The parameters of the host's KVM that decide which guests it runs; those of modules that are not loaded are
    left out. Source: the kernel's admin-guide/kernel-parameters, kvm.*."""
    found = []
    for name in KVM_PARAMETERS:
        with contextlib.suppress(OSError):
            module, parameter = name.split(".")
            found.append(f"{name}={Path('/sys/module', module, 'parameters', parameter).read_text().strip()}")
    return " ".join(found)


def claim_vsock_cid() -> tuple[int, int]:
    """Claim a free guest CID; returns (cid, descriptor of /dev/vhost-vsock that holds the claim).

    A random start of at least 3, then upwards: vsock(7) reserves 0 to 2.
    Raises DeviceMissing.
    """
    try:
        fd = os.open("/dev/vhost-vsock", os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise DeviceMissing(
            f"cannot open /dev/vhost-vsock: {exc.strerror}",
            hint=hint_for(exc) or "load the module: modprobe vhost_vsock",
        ) from exc
    start = random.randrange(3, CID_MAX - 1000)  # noqa: S311 - an address, not a secret
    for cid in range(start, start + 1000):
        try:
            fcntl.ioctl(fd, VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", cid))
        except OSError:
            continue  # in use by another VM
        return cid, fd
    os.close(fd)
    raise DeviceMissing("cannot claim a vsock context id: 1000 in a row are in use")


def file_identity(path: str | Path) -> str:
    """A cheap identity of a file's content: it changes when the file is replaced. Raises OSError."""
    resolved = os.path.realpath(path)
    status = os.stat(resolved)
    return f"{resolved}:{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"


async def version_words(program: str) -> str:
    """What the program prints for --version; asked once while its file stays the same. Raises KatapodError."""
    identity = file_identity(program) if os.path.exists(program) else program
    if identity not in _version_words:
        answer = await run([program, "--version"], timeout_s=VERSION_LIMIT_S, check=False)
        _version_words[identity] = answer.stdout + answer.stderr
    return _version_words[identity]


_version_words: dict[str, str] = {}  # by file_identity: a process of the pool knows it before it is taken


async def virtiofsd_implementation(program: str) -> VirtiofsdImplementation:
    """Raises KatapodError."""
    return parse_implementation(await version_words(program))
