"""Sandboxes without a VM, for kata-monitor: records on disk, and the real management server over processes that sleep.

Each runs in the test's own process, as the supervisor of many. What the guest says was recorded from a real one.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

from katapod.host.state import StateStore
from katapod.model.inspection import Missing
from katapod.model.layout import Layout
from katapod.model.record import ContainerRecord, SandboxRecord, State
from katapod.observe.management import ObservedSandbox
from katapod.rpc.call_times import CallTimes
from katapod.rpc.pb import agent_pb2
from katapod.rpc.status import RpcError, StatusCode
from kit.management_socket import management_socket

__all__ = ["GUEST_TEXT", "RecordedGuest", "VmlessSandbox", "record_of", "silent", "vmless"]

GUEST_TEXT = (Path(__file__).parent / "guest-metrics.txt").read_text()


class RecordedGuest:
    async def call(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        assert method == "GetMetrics"
        return agent_pb2.Metrics(metrics=GUEST_TEXT)

    async def inspect(self, timeout_s: float) -> Any:
        raise RpcError(StatusCode.UNIMPLEMENTED, "there is no guest")


class _NoVmm:
    async def facts(self, limit_s: float) -> Any:
        return None, [Missing("hypervisor", "there is no VMM")]


class VmlessSandbox(ObservedSandbox):
    """A process that sleeps stands for its VMM."""

    agent_url = "vsock://42:1024"
    call_times: Sequence[CallTimes] = ()
    virtiofsd_pids: Sequence[int] = ()
    vmm_helpers: Sequence[int] = ()
    disk_server_pids: Sequence[int] = ()
    vcpus = 1
    mem_mib = 256
    has_network = False

    def __init__(self, sandbox_id: str, vmm_pid: int, guest: RecordedGuest) -> None:
        self._guest = guest
        self._sandbox_id = sandbox_id
        self._vmm_pid = vmm_pid

    @property
    def sandbox_id(self) -> str:
        return self._sandbox_id

    @property
    def vmm_pid(self) -> int:
        return self._vmm_pid

    @property
    def vm(self) -> Any:
        return _NoVmm()

    @property
    def agent(self) -> RecordedGuest:
        return self._guest

    async def overhead(self, seconds: float) -> tuple[float, int]:
        return 1.0, 1 << 20

    def guest_path(self, volume_path: str) -> str:
        raise AssertionError("it has no volumes")

    async def resize_volume(self, volume_path: str, size: int) -> None:
        raise AssertionError("it has no volumes")


def record_of(sandbox_id: str, image: str = "busybox", labels: dict[str, str] | None = None) -> SandboxRecord:
    container = ContainerRecord(sandbox_id, image, ("sleep", "1000"), State.RUNNING, started_at=time.time() - 90)
    return SandboxRecord(
        sandbox_id,
        created_at=time.time() - 95,
        supervisor_pid=os.getpid(),
        boot_id="b",
        state=State.RUNNING,
        accelerator="tcg",
        vcpus=1,
        mem_mib=256,
        containers=(container,),
        labels=labels or {},
    )


@contextlib.asynccontextmanager
async def vmless(
    layout: Layout, record: SandboxRecord, guest: RecordedGuest | None = None
) -> AsyncIterator[VmlessSandbox]:
    """Serve while the block runs; all of it goes at its end."""
    store = StateStore(layout)
    lock = store.create(record)
    try:
        with subprocess.Popen(["sleep", "1000"]) as process:  # noqa: ASYNC220 - at once
            try:
                managed = VmlessSandbox(record.sandbox_id, process.pid, guest or RecordedGuest())
                async with management_socket(managed, layout.sandbox(record.sandbox_id).management_socket):
                    yield managed
            finally:
                process.kill()
    finally:
        os.close(lock)
        store.discard(record.sandbox_id)


@contextlib.contextmanager
def silent(layout: Layout, record: SandboxRecord) -> Iterator[None]:
    """One that takes connections and never answers, as one whose supervisor is stopped by a signal does."""
    store = StateStore(layout)
    lock = store.create(record)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(layout.sandbox(record.sandbox_id).management_socket))
            listener.listen(64)
            yield
    finally:
        os.close(lock)
        store.discard(record.sandbox_id)


async def _serve(root: Path, count: int) -> None:
    """As a program: until a signal."""
    layout = Layout(state_root=root)
    async with contextlib.AsyncExitStack() as stack:
        for number in range(count):
            await stack.enter_async_context(vmless(layout, record_of(f"idle-{number:02}")))
        print("ready", flush=True)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        await ended.wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), int(sys.argv[2])))
