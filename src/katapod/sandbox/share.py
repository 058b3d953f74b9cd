"""The shared directory of a machine: a virtiofsd serves it once somebody needs it, from the start or later or never."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from msgspec.structs import replace

from katapod.host.facts import virtiofsd_implementation
from katapod.host.trace import span
from katapod.host.virtiofsd import VirtiofsdFailed, VirtiofsdProcess, running_virtiofsd
from katapod.model.layout import GUEST_SHARE, SHARE_TAG, SandboxPaths
from katapod.plan.virtiofsd import VirtiofsdPlan
from katapod.rpc.pb import agent_pb2

__all__ = ["Share", "late_share_storage", "share_storage"]

PLACE = "katapod.place"  # an option for our agent: without a bus a kernel has to be told where to look


class Share:
    """Of one machine. `mounted`: the sandbox was created with it; else the first container that needs it has the agent
    mount it. `stopping`: it was asked to end."""

    def __init__(self, plan: VirtiofsdPlan, paths: SandboxPaths, stack: contextlib.AsyncExitStack) -> None:
        """`stack` ends the daemon; it is to be closed when the VMM has ended."""
        self.socket = paths.vm / "vhost-fs.sock"
        self.log_path = paths.state / "virtiofsd.log"
        self.mounted = False
        self.stopping = False
        self._plan = plan
        self._stack = stack
        self._daemon: asyncio.Future[VirtiofsdProcess] = asyncio.get_running_loop().create_future()

    @property
    def pid(self) -> int | None:
        """None: nothing is shared."""
        return self._daemon.result().child.pid if self._daemon.done() else None

    @property
    def returncode(self) -> int | None:
        return self._daemon.result().child.process.returncode if self._daemon.done() else None

    @contextlib.asynccontextmanager
    async def opening(self) -> AsyncIterator[None]:
        """Start the daemon, and in the block have the VMM connect to it; if that fails it is ended again. Raises
        VirtiofsdFailed, MissingProgram."""
        async with contextlib.AsyncExitStack() as stack:
            daemon = await self._enter(stack)
            try:
                yield
            except Exception as exc:
                if daemon.child.process.returncode is not None:
                    raise daemon.explain_end() from exc
                raise
            self._stack.push_async_callback(stack.pop_all().aclose)
        self._daemon.set_result(daemon)

    async def start(self) -> None:
        """Start the daemon of a machine that starts beside it, and whose end is watched. Raises as opening."""
        self._daemon.set_result(await self._enter(self._stack))

    async def _enter(self, stack: contextlib.AsyncExitStack) -> VirtiofsdProcess:
        with span("start virtiofsd", "virtiofsd"):
            plan = self._plan
            if plan.implementation is None:
                plan = replace(plan, implementation=await virtiofsd_implementation(plan.program))
            return await stack.enter_async_context(running_virtiofsd(plan, self.socket, self.log_path))

    def move_log(self, directory: Path) -> None:
        """It has been moved to `directory`."""
        self.log_path = directory / self.log_path.name
        if self._daemon.done():
            self._daemon.result().log_path = self.log_path

    async def wait_end(self) -> str:
        """Of a daemon that has been started, or will be."""
        daemon = await asyncio.shield(self._daemon)
        return await daemon.wait_end()

    def explain_end(self) -> VirtiofsdFailed:
        return self._daemon.result().explain_end()


def share_storage() -> agent_pb2.Storage:
    """What the agent mounts when it creates the sandbox."""
    return agent_pb2.Storage(driver="virtio-fs", source=SHARE_TAG, fstype="virtiofs", mount_point=GUEST_SHARE)


def late_share_storage(place: str) -> agent_pb2.Storage:
    """What it mounts for the first container that needs it, and keeps. `place`: where its kernel finds the device."""
    storage = share_storage()
    storage.shared = True
    storage.driver_options.append(f"{PLACE}={place}")
    return storage
