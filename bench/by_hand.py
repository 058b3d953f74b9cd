"""virtio-fs by hand: the same QEMU device, the same virtiofsd, a guest that does nothing else.

What Katapod's share is compared with. The daemon's command line is Katapod's own plan of it, so that only what
Katapod adds around the device differs.
"""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from bench.measure import Outcome, execute
from bench.raw_boot import pack_initrd
from katapod.plan.virtiofsd import parse_dialect, plan_virtiofsd, render_virtiofsd

__all__ = ["MEMORY_MIB", "SHARE", "by_hand_initrd", "run_by_hand"]

MEMORY_MIB = 2048  # as a sandbox without limits
SHARE = "/share"
MODULES = ("virtio_pci", "virtiofs")
DAEMONS = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")


def module_files(names: tuple[str, ...], dep: str) -> list[str]:
    """Paths of the modules and of what they need, in the order of loading. `dep` is the text of modules.dep."""
    needs = {path: rest.split() for path, _, rest in (line.partition(":") for line in dep.splitlines())}
    order: list[str] = []
    for name in names:
        for path in needs:
            if Path(path).name.partition(".")[0].replace("-", "_") == name:
                order += [*reversed(needs[path]), path]  # modules.dep has the direct needs first
    return list(dict.fromkeys(order))


def by_hand_initrd(rootfs: Path, folder: Path, version: str, script: str) -> Path:
    """The benchmark's root file system as an initrd, whose init mounts the share and runs `script`."""
    root = folder / "by-hand"
    shutil.copytree(rootfs, root, symlinks=True)
    modules = Path("/lib/modules") / version
    lines = ["#!/bin/sh"]
    for index, path in enumerate(module_files(MODULES, (modules / "modules.dep").read_text())):
        shutil.copy(modules / path, root / f"module-{index}.ko")
        lines.append(f"insmod /module-{index}.ko")
    (root / SHARE.lstrip("/")).mkdir()
    mount = f"mount -t virtiofs by-hand {SHARE} || poweroff -f"  # without a share the script must not run
    # An empty line first: the firmware has left escape sequences in the one that it ended with.
    lines += ["mount -t devtmpfs dev /dev", mount, "echo", script, "poweroff -f"]
    (root / "init").write_text("\n".join(lines) + "\n")
    (root / "init").chmod(0o755)
    return pack_initrd(root, folder / "by-hand.cpio")


@contextlib.contextmanager
def _virtiofsd(shared: Path, path: Path) -> Iterator[None]:
    """Serves `shared` on a socket at `path` until its client goes, at most until the end of the block."""
    program = shutil.which("virtiofsd") or next((found for found in DAEMONS if Path(found).exists()), "virtiofsd")
    shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    dialect = parse_dialect(shown.stdout + shown.stderr)
    plan = plan_virtiofsd(program, dialect, shared, cache="auto", extra_args=())
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        os.set_inheritable(listener.fileno(), True)
        daemon = subprocess.Popen(
            render_virtiofsd(plan, fd=listener.fileno()),
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        yield
    finally:
        daemon.terminate()
        daemon.wait()
        path.unlink(missing_ok=True)


def run_by_hand(kernel: Path, initrd: Path, shared: Path, accelerator: str) -> Outcome:
    """Boot, run the script of the initrd on `shared`, power off. Raises BenchError."""
    path = initrd.with_suffix(".sock")
    with _virtiofsd(shared, path):
        return execute(
            [
                "qemu-system-x86_64",
                *("-machine", f"q35,accel={accelerator}"),
                *("-cpu", "host" if accelerator == "kvm" else "max"),
                *("-m", f"{MEMORY_MIB}M"),
                *("-nodefaults", "-no-user-config", "-nographic", "-no-reboot"),
                *("-serial", "stdio"),
                *("-object", f"memory-backend-memfd,id=memory,size={MEMORY_MIB}M,share=on"),
                *("-numa", "node,memdev=memory"),
                *("-chardev", f"socket,id=share,path={path}"),
                *("-device", "vhost-user-fs-pci,chardev=share,tag=by-hand,queue-size=1024"),
                *("-kernel", str(kernel)),
                *("-initrd", str(initrd)),
                *("-append", "console=ttyS0 quiet panic=1"),
            ]
        )
