"""virtio-fs by hand: the same machine and QEMU device, the same virtiofsd, a guest that does nothing else.

What Katapod's share is compared with. The daemon's command line and the machine are Katapod's own plans of them, so
that only what Katapod adds around the device differs.
"""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import replace

from bench.measure import Outcome, execute
from bench.raw_boot import RawBoot, pack_initrd
from katapod.model.config import Config
from katapod.plan.virtiofsd import parse_implementation, plan_virtiofsd, render_virtiofsd
from katapod.vmm.qemu.command_line import plan_qemu, render_qemu
from katapod.vmm.spec import Accelerator, VmSpec

__all__ = ["MEMORY_MIB", "SHARE", "by_hand_initrd", "initrd_with", "plan_machine", "run_by_hand"]

MEMORY_MIB = 2048  # as a sandbox without limits
SHARE = "/share"
MODULES = ("virtio_pci", "virtiofs")
MACHINE = frozenset(
    f"-{word}"
    for word in (
        *("machine", "accel", "cpu", "m", "object", "numa", "smp", "kernel", "initrd", "append"),
        *("no-user-config", "nodefaults", "nographic", "no-reboot"),
    )
)
"""Switches of the plan that make the machine what it is."""
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
    (root / SHARE.lstrip("/")).mkdir()
    mount = f"mount -t virtiofs by-hand {SHARE} || poweroff -f"  # without a share the script must not run
    # An empty line first: the firmware has left escape sequences in the one that it ended with.
    return initrd_with(root, version, MODULES, [mount, "echo", script, "poweroff -f"])


def initrd_with(root: Path, version: str, modules: tuple[str, ...], script: list[str]) -> Path:
    """`root` as an initrd whose init loads these modules of the kernel `version` and runs the lines of `script`."""
    folder = Path("/lib/modules") / version
    lines = ["#!/bin/sh"]
    for index, path in enumerate(module_files(modules, (folder / "modules.dep").read_text())):
        shutil.copy(folder / path, root / f"module-{index}.ko")
        lines.append(f"insmod /module-{index}.ko")
    lines += ["mount -t devtmpfs dev /dev", *script]
    (root / "init").write_text("\n".join(lines) + "\n")
    (root / "init").chmod(0o755)
    return pack_initrd(root, root.with_suffix(".cpio"))


@contextlib.contextmanager
def _virtiofsd(shared: Path, path: Path) -> Iterator[None]:
    """Serves `shared` on a socket at `path` until its client goes, at most until the end of the block."""
    program = shutil.which("virtiofsd") or next((found for found in DAEMONS if Path(found).exists()), "virtiofsd")
    shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    implementation = parse_implementation(shown.stdout + shown.stderr)
    plan = plan_virtiofsd(program, implementation, shared, cache="auto", extra_args=())
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


def plan_machine(kernel: Path, initrd: Path, accelerator: str) -> list[str]:
    """Katapod's own plan of a machine, without the devices and the channels that only Katapod needs. Pure."""
    config = Config()
    vm = VmSpec(
        sandbox_id="by-hand",
        uuid="",
        program="qemu-system-x86_64",
        kernel=kernel,
        initrd=initrd,
        accelerator=Accelerator(accelerator),
        mem_mib=MEMORY_MIB,
        max_mem_mib=MEMORY_MIB,
        vcpus=1,
        max_vcpus=1,
        vm_dir=Path(),
        translation_cache_mib=config.katapod.translation_cache if accelerator == "tcg" else 0,
    )
    plan = plan_qemu(vm)
    kept = tuple(option for option in plan.options if option.switch in MACHINE)
    return render_qemu(replace(plan, options=kept), {})


def run_by_hand(raw: RawBoot, initrd: Path, shared: Path) -> Outcome:
    """Boot, run the script of the initrd on `shared`, power off. Raises BenchError."""
    path = initrd.with_suffix(".sock")
    kernel = raw.kernels.get("PVH", raw.kernels["bzImage"])
    with _virtiofsd(shared, path):
        return execute(
            [
                *plan_machine(kernel, initrd, raw.accelerator),
                *("-serial", "stdio"),
                *("-chardev", f"socket,id=share,path={path}"),
                *("-device", "vhost-user-fs-pci,chardev=share,tag=by-hand,queue-size=1024"),
            ]
        )
