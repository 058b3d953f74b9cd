"""The machine and the versions that a run was made with."""

import contextlib
import os
import platform
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from bench.contestants import PEERS
from bench.raw_boot import guest_manifest

__all__ = ["Machine", "describe_machine"]


@dataclass(frozen=True, slots=True)
class Machine:
    """`versions`: program -> version; none, if not installed. `load`: runnable processes, last minute."""

    cpu: str
    cores: int
    memory_mib: int
    kernel: str
    guest_kernel: str
    accelerator: str
    versions: dict[str, str] = field(default_factory=dict)
    load: float = 0.0
    taken_at: str = ""  # ISO 8601, UTC

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def lines(self) -> list[str]:
        programs = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return [
            f"{self.cpu}, {self.cores} cores, {self.memory_mib} MiB; host kernel {self.kernel}, load {self.load:.1f}",
            f"guest kernel {self.guest_kernel}, accelerator {self.accelerator}; {programs}",
        ]


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _version_of(program: str) -> str | None:
    """The first word with a dot and a digit that `--version` prints."""
    if shutil.which(program) is None:
        return None
    shown = subprocess.run(
        [program, "--version"], input="", capture_output=True, text=True, check=False, timeout=30
    ).stdout
    return next((word.strip(",()") for word in shown.split() if "." in word and word[0].isdigit()), "unknown")


def describe_machine(accelerator: str) -> Machine:
    found = {name: _version_of(name) for name in ("qemu-system-x86_64", *PEERS)}
    return Machine(
        cpu=_cpu(),
        cores=os.cpu_count() or 1,
        memory_mib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        kernel=os.uname().release,
        guest_kernel=str(guest_manifest().get("kernel_version", "unknown")),
        accelerator=accelerator,
        versions={"Katapod": version("katapod"), **{name: shown for name, shown in found.items() if shown}},
        load=os.getloadavg()[0],
        taken_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
