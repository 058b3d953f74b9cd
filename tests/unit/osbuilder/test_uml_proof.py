"""The test boot of a guest image for User-mode Linux, with scripts in place of kernels."""

from pathlib import Path

import pytest

from katapod.osbuilder.errors import ImageNotProven
from katapod.osbuilder.uml_proof import plan_boot, prove_uml


def kernel(tmp_path: Path, script: str) -> Path:
    path = tmp_path / "linux"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


SAY_TOKEN = 'for word; do case $word in katapod.prove=*) echo "katapod-agent: proven ${word#*=}";; esac; done'


async def test_a_guest_whose_agent_says_the_token_is_proven(tmp_path: Path) -> None:
    await prove_uml(kernel(tmp_path, SAY_TOKEN), tmp_path / "disk")


async def test_its_files_lie_in_a_directory_that_goes_with_it(tmp_path: Path) -> None:
    told = tmp_path / "told"

    await prove_uml(kernel(tmp_path, f'test -d "$HOME" && echo "$HOME" > {told}; {SAY_TOKEN}'), tmp_path / "disk")

    assert not Path(told.read_text().strip()).exists()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'Kernel panic - not syncing'; exit 1", "exit status 1.*Kernel panic"),
        ("echo 'katapod-agent: proven other'", "proven other"),
        ("echo 'ptrace: Operation not permitted' >&2; exit 1", "Operation not permitted"),
        ("exit 0", "its console is silent"),
    ],
)
async def test_a_guest_that_does_not_boot_is_shown_with_its_console(tmp_path: Path, script: str, said: str) -> None:
    with pytest.raises(ImageNotProven, match=f"(?s){said}"):
        await prove_uml(kernel(tmp_path, script), tmp_path / "disk")


def test_a_kernel_that_panics_ends_and_the_hosts_files_are_out_of_reach(tmp_path: Path) -> None:
    argv = plan_boot(Path("/k"), Path("/d"), tmp_path)

    assert "panic=1" in argv
    assert any(word.startswith("initcall_blacklist=") and "init_hostfs" in word for word in argv)
    assert "ubd0r=/d" in argv, "read-only"
