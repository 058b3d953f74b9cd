"""What the processes of a container take together."""

import os
import subprocess
from pathlib import Path

import pytest

from bench import memory
from bench.contestants import Peer
from bench.memory import parse_pss_mib, pss_mib_by_part
from bench.workload import Bundles

SHELL = "sleep 1000 & echo started; wait"


@pytest.mark.parametrize(("shared", "counted"), [(False, 2), (True, 1)])
def test_an_address_space_counts_once(
    shared: bool, counted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Helpers of User-mode Linux are processes with the kernel's address space (clone(2) with CLONE_VM)."""
    asked = []

    def share_memory(parent: int, pid: int) -> bool:
        asked.append((parent, pid))
        return shared

    monkeypatch.setattr(memory, "share_memory", share_memory)
    monkeypatch.setattr(memory, "parse_pss_mib", lambda text: float(parse_pss_mib(text) > 0))
    peer = Peer("runc", "runc", Bundles(tmp_path, tmp_path), tmp_path / "runc")
    with subprocess.Popen(["sh", "-c", SHELL], stdout=subprocess.PIPE, process_group=0) as shell:
        try:
            assert shell.stdout is not None
            shell.stdout.readline()
            peer.pid_file("one").write_text(str(shell.pid))
            assert pss_mib_by_part(peer, "one") == {"runc": counted}
        finally:
            os.killpg(shell.pid, 9)
    assert [parent for parent, _ in asked] == [shell.pid], "of the first one nobody is the helper"
