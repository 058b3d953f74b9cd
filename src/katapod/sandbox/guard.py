"""Work for a sandbox that may die meanwhile: whoever waits is told why it died, not what came of that."""

import asyncio
import errno
import os
from collections.abc import Coroutine
from typing import Any, TypeVar

from katapod.model.errors import KatapodError
from katapod.rpc.status import RpcError, StatusCode
from katapod.sandbox.errors import AgentFailed
from katapod.tasks import beside
from katapod.vmm.errors import VmmLinkBroken, VmmRefused

__all__ = ["CAUSE_LIMIT_S", "guarded"]

CAUSE_LIMIT_S = 2.0  # between a link that breaks and the end of a process that broke it
SHARE_IS_GONE = os.strerror(errno.ENOTCONN)  # how the guest's files say that virtiofsd has ended

_Result = TypeVar("_Result")


async def guarded(
    work: Coroutine[Any, Any, _Result], death: "asyncio.Future[KatapodError]", sandbox_id: str
) -> _Result:
    try:
        async with beside(work, may_fail=True) as task:
            waiting: set[asyncio.Future[Any]] = {task, death}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise death.result()
            return task.result()
    except (VmmRefused, VmmLinkBroken) as exc:
        # what the VMM says of a virtiofsd that has died, or a broken link, is a consequence: the cause is on its way
        await asyncio.wait({death}, timeout=CAUSE_LIMIT_S)
        if death.done():
            raise death.result() from exc
        raise
    except RpcError as exc:
        if exc.code is StatusCode.UNAVAILABLE or SHARE_IS_GONE in exc.message:
            # the channel breaks, and the guest is told, a moment before we see that VMM or virtiofsd have ended
            await asyncio.wait({death}, timeout=CAUSE_LIMIT_S)
            if death.done():
                raise death.result() from exc
        raise AgentFailed(f"the agent of sandbox {sandbox_id} failed: {exc.message}", code=exc.code) from exc
