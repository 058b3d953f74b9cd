"""A VMM that runs nothing, with an agent that answers over a socket pair: whole sandboxes live and end in milliseconds.

What goes wrong is said before: `fails` has an error for a call of the VMM, `refuses` an error for a call of the agent;
`silent` calls are never answered; `before` has something to be done, or waited for, when a call is made, `after` when
a device has come, gone or changed.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from katapod.model.errors import KatapodError
from katapod.model.inspection import Hypervisor, Missing, OptionPart
from katapod.rpc.framing import FrameDecoder, encode_response, parse_request
from katapod.rpc.pb import katapod_pb2
from katapod.rpc.status import RpcError
from katapod.vmm.devices import Device, Disk, Memory, Nic, SharedDirectory
from katapod.vmm.errors import VmmFailed
from katapod.vmm.judge import Judge
from katapod.vmm.protocol import Capabilities, Channel, DiskError, Handed, VmmLogs
from katapod.vmm.qemu.judge import QemuJudge
from katapod.vmm.spec import NO_OPTIONS, VmmOptions, VmSpec

__all__ = ["ALL", "FakeAgent", "FakeShare", "FakeVm", "FakeVmm", "name_of"]

ALL = Capabilities(
    disk_slots=tuple(range(10, 16)),
    nic_slots=tuple(range(20, 24)),
    share_slot=1,
    vsock=False,
    more_slots="take another VMM",
)
NO_PID = 2**22 + 1  # beyond the largest


@dataclass
class FakeAgent:
    """Answers each call with an empty message, in the order in which they come."""

    asked: list[str] = field(default_factory=list)
    refuses: dict[str, RpcError] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    before: dict[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)

    async def serve(self, sock: socket.socket) -> None:
        """Until the other end hangs up, or this is cancelled."""
        reader, writer = await asyncio.open_connection(sock=sock)
        decoder = FrameDecoder()
        try:
            while data := await reader.read(1 << 16):
                for frame in decoder.feed(data):
                    request = parse_request(frame)
                    self.asked.append(request.method)
                    if request.method in self.before:
                        await self.before[request.method]()
                    if request.method in self.silent:
                        continue
                    error = self.refuses.get(request.method)
                    answer = katapod_pb2.ClockResponse(time_ns=time.time_ns()) if request.method == "Clock" else None
                    writer.write(
                        encode_response(frame.stream_id, answer.SerializeToString() if answer is not None else b"")
                        if error is None
                        else encode_response(frame.stream_id, code=error.code, message=error.message)
                    )
        except ConnectionError:
            pass
        finally:
            writer.close()


def name_of(device: Device) -> str:
    match device:
        case SharedDirectory():
            return f"share {device.tag}"
        case Disk():
            return f"disk {device.disk_id}"
        case Nic():
            return f"nic {device.number}"
        case Memory():
            return f"memory {device.number}"


class FakeVm:
    """A VirtualMachine. `said` has what was asked of it, in order."""

    def __init__(self, kind: "FakeVmm", spec: VmSpec, logs: VmmLogs) -> None:
        self.logs = logs
        self.stopping = False
        self.expendable = False
        self.spec = spec
        self.said: list[str] = []
        self.returncode: int | None = None
        self.attached: dict[str, Device] = {}
        self.ended = asyncio.Event()
        self.tell_of_disk: Callable[[DiskError], None] = lambda error: None
        self.grown: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._kind = kind
        self._near, self._far = socket.socketpair()
        self._taken = False
        self._serving: asyncio.Task[None] | None = None
        self._served = False  # else the task was cancelled before it had begun

    @property
    def pid(self) -> int:
        return NO_PID

    async def _ask(self, what: str) -> None:
        self.said.append(what)
        if what in self._kind.before:
            await self._kind.before[what]()
        if what in self._kind.fails:
            raise self._kind.fails[what]

    async def _answer(self, what: str) -> None:
        if what in self._kind.after:
            await self._kind.after[what]()

    def take_channel(self, channel: Channel) -> socket.socket | None:
        if channel is not Channel.AGENT or self._taken:
            return None
        self._taken = True
        return self._near

    async def run(self) -> None:
        await self._ask("run")
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve(), name="fake-agent")

    async def _serve(self) -> None:
        self._served = True
        await self._kind.agent.serve(self._far)

    async def pause(self) -> None:
        await self._ask("pause")

    async def attach(self, device: Device) -> str:
        await self._ask(f"attach {name_of(device)}")
        self.attached[name_of(device)] = device
        await self._answer(f"attach {name_of(device)}")
        return "" if isinstance(device, Memory) else f"place/{device.slot}"

    async def detach(self, device: Device) -> None:
        await self._ask(f"detach {name_of(device)}")
        self.attached.pop(name_of(device), None)  # else another connection has taken it out
        await self._answer(f"detach {name_of(device)}")

    async def settle(self, device: Device) -> bool:
        await self._ask(f"settle {name_of(device)}")
        return name_of(device) in self.attached

    def expect_memory(self, last: int) -> "asyncio.Future[str]":
        if last >= 0 and not self.grown.done():
            self.grown.set_result(self._kind.memory_refusal)
        return self.grown

    async def add_vcpus(self, count: int) -> None:
        await self._ask(f"add {count} vCPUs")
        await self._answer(f"add {count} vCPUs")

    async def vcpu_threads(self) -> Sequence[int]:
        return ()

    def busy_s(self) -> float:
        return 0.0

    async def resize_disk(self, disk_id: str, size: int) -> None:
        await self._ask(f"resize {disk_id} to {size}")
        await self._answer(f"resize {disk_id} to {size}")

    async def save_state(self, path: Path) -> None:
        await self._ask("save")
        path.write_bytes(b"a state")

    async def load_state(self, state_fd: int) -> None:
        await self._ask("load")

    async def facts(self, limit_s: float) -> tuple[Hypervisor | None, list[Missing]]:
        return None, [Missing("hypervisor", "there is no VMM")]

    def on_disk_error(self, handler: Callable[[DiskError], None]) -> None:
        self.tell_of_disk = handler

    def expect_stop(self) -> "asyncio.Future[Any]":
        return asyncio.get_running_loop().create_future()

    def end(self, returncode: int) -> None:
        """As if the process had ended by itself."""
        self.returncode = returncode
        self.ended.set()
        self.hang_up()

    def hang_up(self) -> None:
        """As if the agent had ended."""
        if self._serving is not None:
            self._serving.cancel()
        else:
            self._far.close()

    async def wait_end(self) -> str:
        await self.ended.wait()
        return f"status {self.returncode}"

    def explain_end(self) -> VmmFailed:
        return VmmFailed(f"the VMM ended unexpectedly: status {self.returncode}", returncode=self.returncode)

    async def stop(self, *, soft: bool = True) -> bool:
        self.said.append("stop" if soft and not self.expendable else "kill")
        self.stopping = True
        if self.returncode is None:
            self.end(0)
        if self._serving is not None:
            await asyncio.wait({self._serving})
            if not self._served:
                self._far.close()
        if not self._taken:
            self._near.close()
        return True


@dataclass(eq=False)
class FakeVmm:
    """A Vmm, and what the tests want of its machines: those that it has started are in `machines`."""

    name: str = "the fake"
    can: Capabilities = ALL
    fails: dict[str, Exception] = field(default_factory=dict)
    before: dict[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)
    after: dict[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)
    memory_refusal: str = ""
    agent: FakeAgent = field(default_factory=FakeAgent)
    machines: list[FakeVm] = field(default_factory=list)
    given: list[Mapping[Handed, int]] = field(default_factory=list)

    @property
    def vm(self) -> FakeVm:
        return self.machines[-1]

    @property
    def judge(self) -> Judge:
        return QemuJudge()

    def program(self, config: object) -> str:
        return "/none"

    def guest(self, config: Any) -> tuple[Path, Path]:
        return Path(config.qemu.kernel), Path(config.qemu.initrd)

    def guest_params(self, config: Any) -> tuple[str, ...]:
        return ()

    def options(self, config: object) -> VmmOptions:
        return NO_OPTIONS

    def capabilities(self, spec: VmSpec) -> Capabilities:
        return self.can

    def describe(self, spec: VmSpec) -> str:
        return f"{spec.vcpus} vCPUs\n{spec.mem_mib} MiB"

    def describe_for_host(self, spec: VmSpec) -> str:
        return "a machine"

    def files(self, spec: VmSpec) -> tuple[str | Path, ...]:
        return ()

    def kernel_params(self, spec: VmSpec) -> str:
        return "quiet"

    def explain(self, command: Sequence[str]) -> tuple[OptionPart, ...]:
        return ()

    def kernel_parameters_in(self, command: Sequence[str]) -> str:
        return ""

    @contextlib.asynccontextmanager
    async def start(
        self, spec: VmSpec, logs: VmmLogs, *, given: Mapping[Handed, int] | None = None, netns: Path | None = None
    ) -> AsyncIterator[FakeVm]:
        if "start" in self.before:
            await self.before["start"]()
        if "start" in self.fails:
            raise self.fails["start"]
        vm = FakeVm(self, spec, logs)
        self.machines.append(vm)
        self.given.append(given or {})
        try:
            yield vm
        finally:
            await vm.stop()

    @contextlib.asynccontextmanager
    async def connect(self, vm_dir: Path, limit_s: float) -> AsyncIterator[FakeVm]:
        """To the last machine: what is asked of it by this connection is in its `said`, too."""
        if "connect" in self.fails:
            raise self.fails["connect"]
        yield self.vm


class FakeShare:
    """In place of a virtiofsd."""

    def __init__(self) -> None:
        self.log_path = Path("/none")
        self.child = SimpleNamespace(pid=NO_PID, process=SimpleNamespace(returncode=None))
        self.released = False
        self._ended = asyncio.Event()

    def end(self, returncode: int) -> None:
        self.child.process.returncode = returncode
        self._ended.set()

    async def wait_end(self) -> str:
        await self._ended.wait()
        return f"status {self.child.process.returncode}"

    def explain_end(self) -> KatapodError:
        return KatapodError(f"virtiofsd ended unexpectedly: status {self.child.process.returncode}")
