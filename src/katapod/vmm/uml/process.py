"""A running User-mode Linux kernel: carries out a UmlPlan in a jail, and serves the devices that it finds there."""

import contextlib
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from katapod.host.cpu_placement import CpuPlacement
from katapod.host.jail import Program, running_in_jail
from katapod.host.process import Child
from katapod.host.regset import preload
from katapod.tasks import beside
from katapod.vmm.devices import SharedDirectory
from katapod.vmm.uml.balloon_device import serving_balloon
from katapod.vmm.uml.console_device import serving_console
from katapod.vmm.uml.cpuinfo import CPUINFO, features_for_guest
from katapod.vmm.uml.plan import (
    BALLOON_SOCKET,
    CONSOLE_SOCKET,
    KERNEL,
    LIBRARY,
    SHARE_SOCKET,
    WORK,
    FdSlot,
    UmlPlan,
    argv0_of,
    plan_jail,
    render_uml,
)
from katapod.vmm.uml.share_device import joining_share
from katapod.vmm.uml.sockets import listening

__all__ = ["running_kernel", "serving_share"]


@contextlib.asynccontextmanager
async def serving_share(sockets: Path, share: SharedDirectory, uid: int) -> AsyncIterator[None]:
    """Let the kernel of the user `uid`, which has `sockets` in its jail, find `share`, while the block runs."""
    with listening(sockets / SHARE_SOCKET, uid) as listener:
        async with joining_share(listener, share.socket, share.tag):
            yield


# long: what the kernel is given, each of another kind
@contextlib.asynccontextmanager
async def running_kernel(
    plan: UmlPlan,
    *,
    uid: int,
    placement: CpuPlacement,
    share: SharedDirectory | None,
    ports: Mapping[str, socket.socket],
    fds: Mapping[FdSlot, int],
    output: int,
    netns: Path | None,
) -> AsyncIterator[Child]:
    """Start the kernel as the user `uid`, which no other sandbox has; kill it, and all that it has started, at the end.

    `ports` are our ends of what the guest's ports of that name carry. Raises VmmFailed, HostLacks, CannotRun.
    """
    async with contextlib.AsyncExitStack() as stack:
        listener = stack.enter_context(listening(plan.sockets / CONSOLE_SOCKET, uid))
        await stack.enter_async_context(serving_console(listener, ports))
        if share is not None:
            await stack.enter_async_context(serving_share(plan.sockets, share, uid))
        if plan.has_balloon:
            listener = stack.enter_context(listening(plan.sockets / BALLOON_SOCKET, uid))
            await stack.enter_async_context(serving_balloon(listener))
        argv = (argv0_of(plan.vm_dir), *render_uml(plan, fds))
        program = Program(str(KERNEL), argv, {"HOME": str(WORK), "TMPDIR": str(WORK), **preload(LIBRARY)})
        with open(CPUINFO) as host:  # of hundreds of processors, of which the first will do
            plan.cpuinfo.write_text(features_for_guest(host))
        plan.cpuinfo.chmod(0o444)
        jail = plan_jail(plan, uid, netns)
        with placement.starting():
            kernel = await stack.enter_async_context(
                running_in_jail(jail, program, output=output, pass_fds=tuple(fds.values()), soft=False)
            )
        await stack.enter_async_context(beside(placement.follow(kernel.pid), name="cpu-placement"))
        yield kernel
