"""The raw boot: QEMU q35, the same accelerator, the guest's kernel, an initrd whose init only powers off."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CACHE", "RawBoot", "bare_qemu", "guest_manifest", "pack_initrd"]

CACHE = Path("/var/cache/kata-containers")
INIT = "#!/bin/busybox sh\nexec /bin/busybox poweroff -f\n"


def guest_manifest() -> dict[str, object]:
    """What `kata-runtime image build` wrote about its image. Raises OSError if there is none."""
    found = json.loads((CACHE / "osbuilder-images" / "current" / "manifest.json").read_text())
    assert isinstance(found, dict)
    return found


def _power_off_initrd(folder: Path) -> Path:
    root = folder / "power-off"
    (root / "bin").mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", root / "bin" / "busybox")
    init = root / "init"
    init.write_text(INIT)
    init.chmod(0o755)
    return pack_initrd(root, folder / "power-off.cpio")


def bare_qemu(accelerator: str, mem_mib: int) -> list[str]:
    """A q35 without devices, which ends when its guest would restart."""
    return [
        "qemu-system-x86_64",
        *("-machine", f"q35,accel={accelerator}"),
        *("-cpu", "host" if accelerator == "kvm" else "max"),
        *("-m", f"{mem_mib}M"),
        *("-nodefaults", "-no-user-config", "-nographic", "-no-reboot"),
    ]


def pack_initrd(root: Path, archive: Path) -> Path:
    """All below `root` as an uncompressed initrd; returns it."""
    names = b"".join(os.fsencode(path.relative_to(root)) + b"\0" for path in sorted(root.rglob("*")))
    with archive.open("wb") as handle:
        subprocess.run(["cpio", "-o", "-0", "-H", "newc", "--quiet"], cwd=root, input=names, stdout=handle, check=True)
    return archive


@dataclass(frozen=True, slots=True)
class RawBoot:
    """Kernels by name ("bzImage", "PVH") and the initrd that they boot."""

    kernels: dict[str, Path]
    initrd: Path
    accelerator: str

    @classmethod
    def prepare(cls, folder: Path, accelerator: str) -> "RawBoot":
        """bzImage is the distribution's, PVH the uncompressed one of the guest image, if it could be extracted."""
        manifest = guest_manifest()
        kernels = {"bzImage": Path(f"/boot/vmlinuz-{manifest.get('kernel_version', os.uname().release)}")}
        if manifest.get("pvh"):
            kernels["PVH"] = CACHE / "vmlinuz.container"
        return cls(kernels, _power_off_initrd(folder), accelerator)

    def command(self, kernel: str) -> list[str]:
        """Ends with 0 when the guest has powered off."""
        return [
            *bare_qemu(self.accelerator, 256),
            *("-serial", "stdio"),
            *("-kernel", str(self.kernels[kernel])),
            *("-initrd", str(self.initrd)),
            *("-append", "console=ttyS0 quiet panic=1"),
        ]
