"""Test-boot a guest image for User-mode Linux: its kernel is a program, so that no VMM is needed.

The image is our own and nothing of others runs in it, hence no jail. Source of the options: linux
Documentation/virt/uml/user_mode_linux_howto_v2.rst, `linux.uml --help`.
"""

import os
import secrets
import tempfile
from pathlib import Path

from katapod.host.process import run
from katapod.host.regset import preload
from katapod.model.flavour import UML_ROOT
from katapod.osbuilder.errors import ImageNotProven

__all__ = ["plan_boot", "prove_uml"]

LIMIT_S = 60.0
MEM_MIB = 256
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of our own below it
CONSOLE_LINES = 25


def plan_boot(kernel: Path, disk: Path, directory: Path, *parameters: str) -> list[str]:
    """The command line of a guest with nothing but its system disk and a console, which is its standard output.

    Its files lie in `directory`. A kernel that panics ends: else it would spin for ever. hostfs, which shows the host's
    files, is left out, and so are the speed tests of RAID and the old kind of terminals: 512 devices.
    """
    left_out = "initcall_blacklist=raid6_select_algo,calibrate_xor_blocks,init_hostfs,harddog_miscdev_init"
    machine = [f"mem={MEM_MIB}M", f"uml_dir={directory}", f"ubd0r={disk}", "con=null", "con0=fd:0,fd:1"]
    return [str(kernel), *machine, *UML_ROOT, "quiet", "panic=1", left_out, "pty.legacy_count=0", *parameters]


async def prove_uml(kernel: Path, disk: Path) -> None:
    """Boot once, until the agent says that all it needs works. Raises ImageNotProven with the console's last lines."""
    token = secrets.token_hex(8)
    parent = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else disk.parent
    with tempfile.TemporaryDirectory(prefix="katapod-proof-", dir=parent) as scratch:
        argv = plan_boot(kernel, disk, Path(scratch), f"katapod.prove={token}")
        only_env = {"HOME": scratch, "TMPDIR": scratch, **preload()}
        done = await run(argv, only_env=only_env, timeout_s=LIMIT_S, check=False)
    if f"katapod-agent: proven {token}" in done.stdout:
        return
    said = "\n".join(f"{done.stdout}\n{done.stderr}".strip().splitlines()[-CONSOLE_LINES:])
    raise ImageNotProven(
        f"cannot boot {disk} with {kernel}: "
        + (f"exit status {done.returncode}; last lines of its console:\n{said}" if said else "its console is silent")
    )
