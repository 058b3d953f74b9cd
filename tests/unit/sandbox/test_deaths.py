"""Which of the processes of a sandbox is named as the one that died, with real processes in their place."""

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest

from katapod.model.errors import KatapodError
from katapod.sandbox import machine
from katapod.sandbox.machine import _watch_processes


@dataclass
class StandIn:
    process: asyncio.subprocess.Process
    name: str
    stopping: bool = False

    @property
    def returncode(self) -> int | None:
        return self.process.returncode

    async def wait_end(self) -> str:
        return str(await self.process.wait())

    def explain_end(self) -> KatapodError:
        return KatapodError(f"{self.name} ended")


async def standing_in(script: str, name: str) -> Any:
    """What the watch asks of QEMU or virtiofsd, answered by a shell."""
    process = await asyncio.create_subprocess_exec("sh", "-c", script)
    return StandIn(process, name)


@pytest.mark.parametrize(
    ("qemu", "virtiofsd", "named"),
    [
        ("sleep 0.1", "exit 0", "QEMU"),  # which has closed its end, and takes its memory down before it is gone
        ("exit 0", "exec sleep 600", "QEMU"),
        ("exec sleep 600", "kill -9 $$", "virtiofsd"),
        ("exec sleep 600", "exit 1", "virtiofsd"),
    ],
)
async def test_who_died_first(qemu: str, virtiofsd: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "VMM_END_S", 60.0)
    vm, share = await standing_in(qemu, "QEMU"), await standing_in(virtiofsd, "virtiofsd")
    death: asyncio.Future[KatapodError] = asyncio.get_running_loop().create_future()
    await asyncio.wait_for(_watch_processes(vm, share, death), 60)
    assert str(death.result()) == f"{named} ended"
    for process in (vm.process, share.process):
        if process.returncode is None:
            process.kill()
        await process.wait()
