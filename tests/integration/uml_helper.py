"""Guests of User-mode Linux whose init is a script of the test's, as root and without containers, each in its jail."""

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace
from vm_helper import settled

from katapod.host.jail import Program, running_in_jail
from katapod.host.logs import kept_pipe
from katapod.host.process import Child
from katapod.host.regset import preload
from katapod.plan.jail import Bind, JailPlan
from katapod.vmm.uml.libraries import libraries_of
from katapod.vmm.uml.plan import DISK, KERNEL, LIBRARY, WORK, UmlPlan, plan_jail
from kit.uids import UML_UID as UID
from kit.uml_guest import BUSYBOX
from kit.uml_guest import KERNEL as LINUX

MEM_MIB = 64
LIMIT_S = 180.0
LEFT_OUT = "initcall_blacklist=raid6_select_algo,calibrate_xor_blocks,init_hostfs,ssl_init"
# Without ssl_init these are 576 terminals less. The kernel forks for the uevent of each one, and in 64 MiB a guest has
# 280 to 400 threads: those that have not ended when init starts can make its fork(2) fail with EAGAIN.
NO_TERMINALS = "pty.legacy_count=0"


@dataclass
class Guest:
    child: Child
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    async def has_said(self, words: str) -> None:
        assert await settled(lambda: words in self.said, LIMIT_S), self.said

    async def wait_end(self) -> int:
        async with asyncio.timeout(LIMIT_S):
            return await self.child.process.wait()


def make_initrd(directory: Path, script: str) -> Path:
    root = directory / "initrd"
    for name in ("bin", "proc", "sys", "dev", "tmp", "mnt"):
        (root / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin" / "busybox")
    for name in subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split():
        if name != "busybox":
            (root / "bin" / name).symlink_to("busybox")
    init = root / "init"
    mounts = "mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev"
    init.write_text(f"#!/bin/sh\n{mounts}\nexec 2>&1\n{script}\n")
    init.chmod(0o755)
    os.mknod(root / "dev" / "console", 0o600 | 0o020000, os.makedev(5, 1))
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    archive = directory / "initrd.cpio"
    with archive.open("wb") as target:
        subprocess.run([BUSYBOX, "cpio", "-o", "-H", "newc"], cwd=root, input=names.encode(), stdout=target, check=True)
    return archive


def kernel_plan(directory: Path, initrd: Path) -> UmlPlan:
    plan = UmlPlan(LINUX, libraries_of(LINUX), initrd, directory, MEM_MIB, ())
    plan.sockets.mkdir(exist_ok=True)
    plan.cpuinfo.write_text("flags\t\t: fpu\n")
    return plan


# long: what tests vary
@contextlib.asynccontextmanager
async def guest_running(
    directory: Path,
    script: str,
    *parameters: str,
    binds: Sequence[Bind] = (),
    netns: Path | None = None,
    uid: int = UID,
    processes: int | None = None,
    soft: bool = False,
) -> AsyncIterator[Guest]:
    """A guest whose init runs `script`, and whose console is kept in `directory`."""
    plan = kernel_plan(directory, make_initrd(directory, script))
    jail: JailPlan = plan_jail(plan, uid, netns)
    jail = replace(jail, binds=(*jail.binds, *binds))
    if processes is not None:
        jail = replace(jail, limits=replace(jail.limits, processes=processes))
    words = (
        *(f"linux.uml {directory}", f"mem={MEM_MIB}M", f"initrd={DISK}", "con=null", "con0=fd:1,fd:1"),
        *("umid=vm", f"uml_dir={WORK}/", "quiet", "lpj=30613504", LEFT_OUT, NO_TERMINALS, "panic=1"),
        *("selinux=0", *parameters),
    )
    program = Program(str(KERNEL), words, {"HOME": str(WORK), "TMPDIR": str(WORK), **preload(LIBRARY)})
    async with (
        kept_pipe(directory / "console", 1 << 20) as pipe,
        running_in_jail(jail, program, output=pipe.write_end, soft=soft) as child,
    ):
        pipe.close()
        yield Guest(child, directory / "console")


def processes_of(uid: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and f"\nUid:\t{uid}\t" in Path(f"/proc/{entry}/status").read_text():
                found.append(int(entry))
    return found
