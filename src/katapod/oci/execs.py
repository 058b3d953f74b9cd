"""Further processes in a container: each with a proxy that descends from the `exec` that asked for it."""

import asyncio
import logging
import signal
from collections.abc import Coroutine
from typing import Any

from msgspec.structs import replace

from katapod.model import oci
from katapod.model.errors import KatapodError
from katapod.model.exit_status import KILLED_STATUS
from katapod.oci import wire
from katapod.oci.connection import Connection
from katapod.oci.container import OciContainer
from katapod.oci.processes import ExecProcess, ProcessStreams, ProxyLink
from katapod.plan.container_spec import plan_exec_process
from katapod.plan.guest_spec import process_for_guest
from katapod.rpc.oci_message import process_to_message
from katapod.sandbox.client import start_exec
from katapod.sandbox.stdio import carry
from katapod.tasks import Background

__all__ = ["Execs"]

log = logging.getLogger(__name__)


class Execs:
    def __init__(self, background: Background) -> None:
        self._background = background

    async def start(self, connection: Connection, message: wire.Message, container: OciContainer) -> None:
        """Answers in between where the proxy is to be. Raises KatapodError, Gone; nothing is left then."""
        process = _process_of(message, container.made.plan.spec)
        streams = ProcessStreams(connection.take_fds(1 if process.terminal else 3), terminal=process.terminal)
        proxy: ProxyLink | None = None
        try:
            beside = f"/proc/{container.proxy.pid}/ns"
            place = {"netns": f"{beside}/net", "mounts": f"{beside}/mnt", "pids": f"{beside}/pid"}
            await connection.say(place | {"cgroups": container.state["members"]})
            told = await connection.hear()
            proxy = ProxyLink(int(told["pid"]), connection.take_fds(1)[0])
            stdin, stdout, stderr = streams.open()
            sandbox = container.made.sandbox
            if (size := streams.size()) is not None:  # from the first moment: the program may look at once
                process = replace(process, console_size=oci.Box(height=size[0], width=size[1]))
            sent = process_to_message(process_for_guest(process))
            guest = await sandbox.guard(start_exec(sandbox.agent, container.id, sent, user=""))
        except BaseException:
            streams.close()
            if proxy is not None:
                proxy.die(signal.SIGKILL)
                proxy.close()
            raise
        started = ExecProcess(sandbox, guest, proxy, streams)
        container.execs.append(started)
        work = self._follow(container, started, carry(guest, stdin, stdout, stderr))
        started.following = self._background.start(work, name=f"follow-{guest.exec_id}")

    async def _follow(self, container: OciContainer, process: ExecProcess, work: Coroutine[Any, Any, int]) -> None:
        status = KILLED_STATUS

        async def kill() -> None:
            await process.signal(signal.SIGKILL)

        listen = process.proxy.listen(process.signal, kill)
        listening = self._background.start(listen, name=f"proxy-{process.guest.exec_id}")
        try:
            if process.guest.terminal:
                await process.signal(signal.SIGWINCH)
            status = await container.made.sandbox.guard(work)
        except KatapodError as exc:
            log.info("exec %s in %s has ended: %s", process.guest.exec_id, container.id, exc)
        finally:
            process.streams.close()
            container.execs.remove(process)
            process.proxy.exit(status)
            listening.cancel()
            await asyncio.wait({listening})
            process.proxy.close()

    async def end(self, container: OciContainer) -> None:
        """The container has stopped, and its other processes with it."""
        following = {each.following for each in container.execs if each.following is not None}
        if following:
            await asyncio.wait(following, timeout=1.0)


def _process_of(message: wire.Message, spec: oci.Spec) -> oci.Process:
    """That of --process, else the container's own with the changes that the options ask for. Raises SpecError."""
    if message.get("process"):
        process = oci.parse_process(str(message["process"]).encode(), "the process")
        return replace(process, terminal=bool(message["terminal"]))
    process = plan_exec_process(
        spec,
        tuple(message["args"]),
        env=tuple(message["env"]),
        cwd=str(message["cwd"]),
        user=_user(str(message["user"]), tuple(message["groups"])),
        tty=bool(message["terminal"]),
        console_size=None,
        privileged=False,
    )
    return replace(
        process,
        no_new_privileges=process.no_new_privileges or bool(message["no-new-privs"]),
        capabilities=_with(process.capabilities or oci.Capabilities(), tuple(message["caps"])),
    )


def _with(sets: oci.Capabilities, names: tuple[str, ...]) -> oci.Capabilities:
    """Further capabilities in all sets but the ambient one, as runc's --cap has it."""
    kinds = ("bounding", "effective", "permitted", "inheritable")
    return replace(sets, **{kind: tuple(dict.fromkeys((*getattr(sets, kind), *names))) for kind in kinds if names})


def _user(text: str, groups: tuple[int, ...]) -> oci.User | None:
    if not text:
        return None
    uid, _, gid = text.partition(":")
    return oci.User(uid=int(uid), gid=int(gid or 0), additional_gids=groups)
