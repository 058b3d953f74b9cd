"""A container: one that this program has created, or another's that it has attached to."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Unpack

from katapod.api.context import need_root, run_context, states
from katapod.api.info import ContainerInfo, container_info
from katapod.api.links import Attached, Held, Link
from katapod.api.options import ImageSource, Options, container_request, environment, signal_number
from katapod.api.process import Completed, Process, checked, following, open_ends
from katapod.api.streams import PIPE, Stream
from katapod.model.errors import InvalidState
from katapod.model.flags import parse_user, parse_workdir
from katapod.sandbox import container as core
from katapod.sandbox.client import connect_control
from katapod.sandbox.execs import ExecRequest
from katapod.sandbox.lookup import find_sandbox
from katapod.supervisor.start import created

__all__ = ["Container", "run"]


class Container:
    """Made by `create`, `attach` or Sandbox.create, each of which is an asynchronous context manager."""

    def __init__(self, link: Link) -> None:
        """For Katapod itself."""
        self._link = link
        self._life = contextlib.AsyncExitStack()
        self._process: Process | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def create(
        cls, image: ImageSource, *command: str, name: str = "", **options: Unpack[Options]
    ) -> AsyncIterator["Container"]:
        """A container in a virtual machine of its own, ready to be started. At the end of the block it is ended,
        whatever it does, and nothing of it is left.

        Without a `command` it is the image's; without a `name` a random one.

        Raises UsageError, AlreadyExists, NotFound, ImageError, HostLacks, NoSpace, ConfigError, CommandNotFound,
        CommandNotExecutable, KatapodError.
        """
        request = container_request(image, command, name, options)
        need_root(f"create container {request.container_id}")
        async with (
            created(run_context(options.get("config_file", "")), request) as made,
            opened(made) as container,
        ):
            yield container

    @classmethod
    @contextlib.asynccontextmanager
    async def attach(cls, name: str) -> AsyncIterator["Container"]:
        """A container that runs on this host, whoever has created it: by its name or id, or the beginning of an id of
        64 digits. A sandbox's own name means its first container. It goes on after the block.

        Raises UsageError, NotFound, InvalidState if it has ended.
        """
        need_root(f"attach to {name}")
        store = states()
        found = find_sandbox(store, name)
        async with connect_control(store, found.record.sandbox_id) as client:
            yield cls(Attached(client, found.container_id or found.record.sandbox_id))

    @property
    def id(self) -> str:
        return self._link.container_id

    @property
    def sandbox_id(self) -> str:
        return self._link.record().sandbox_id

    def info(self) -> ContainerInfo:
        """What is on record about it by now. Raises NotFound if it has been removed."""
        return container_info(self._link.record(), self.id)

    async def start(self, *, stdin: Stream = None, stdout: Stream = None, stderr: Stream = None) -> Process:
        """Let it run; returns its first process. Each stream is PIPE, a descriptor or file, or None.

        Raises UsageError, InvalidState if it was started before or is another's, KatapodError.
        """
        link = self._link
        if not isinstance(link, Held) or self._process is not None:
            raise InvalidState(f"cannot start container {self.id}: it is {self.info().state.value}")
        ends = self._life.enter_context(open_ends(stdin, stdout, stderr))
        carrying = await link.start(ends.source, ends.out, ends.err)
        process = following(
            lambda task: Process(link.container.process, ends, task, link.kill, link.guard), carrying, ends
        )
        self._process = await self._life.enter_async_context(process)
        return self._process

    async def wait(self) -> int:
        """The exit code of its first process, once that has ended: 128 + N if signal N killed it.

        Raises InvalidState if it was not started; NotFound if it is another's and was removed when it ended;
        KatapodError if its sandbox died.
        """
        if isinstance(self._link, Attached):
            return await self._link.wait()
        if self._process is None:
            raise InvalidState(f"cannot wait for container {self.id}: it was not started")
        return await self._process.wait()

    async def kill(self, signal: int | str = "KILL") -> None:
        """Send a signal, by name or number, to its first process. Raises UsageError, InvalidState, KatapodError."""
        await self._link.kill(signal_number(signal))

    async def pause(self) -> None:
        """Freeze all its processes. Raises InvalidState, KatapodError."""
        await self._link.pause()

    async def resume(self) -> None:
        """Let them go on. Raises InvalidState, KatapodError."""
        await self._link.resume()

    # long: what a process may differ in from its container's first, and its streams
    @contextlib.asynccontextmanager
    async def exec(
        self,
        *command: str,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        terminal: bool = False,
        privileged: bool = False,
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
    ) -> AsyncIterator[Process]:
        """One more process in the running container: with its environment and rights unless something else is given. At
        the end of the block it is killed if it still runs.

        Raises UsageError, InvalidState, NotFound if the container has ended, CommandNotFound, CommandNotExecutable,
        KatapodError.
        """
        request = ExecRequest(
            command,
            env=environment(env or {}),
            cwd=parse_workdir(cwd, "cwd") if cwd else "",
            user=parse_user(user, "user") if user else None,
            tty=terminal,
            privileged=privileged,
        )
        link = self._link
        with open_ends(stdin, stdout, stderr) as ends:
            guest = await link.exec(request)

            async def send(number: int) -> None:
                await link.guard(guest.signal(number))

            carrying = link.carry(guest, ends.source, ends.out, ends.err)
            async with following(lambda task: Process(guest, ends, task, send, link.guard), carrying, ends) as process:
                yield process

    # long: as exec
    async def run(
        self,
        *command: str,
        input: bytes = b"",
        check: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        privileged: bool = False,
    ) -> Completed:
        """Run one more process to its end, and keep its output: at most OUTPUT_MAX bytes of each stream.

        Raises as exec; with `check` CommandFailed if its status is not zero.
        """
        async with self.exec(
            *command,
            env=env,
            cwd=cwd,
            user=user,
            privileged=privileged,
            stdin=PIPE if input else None,
            stdout=PIPE,
            stderr=PIPE,
        ) as process:
            stdout, stderr = await process.communicate(input)
            done = Completed(await process.wait(), stdout, stderr)
        return checked(done, command) if check else done


@contextlib.asynccontextmanager
async def opened(made: core.Container) -> AsyncIterator[Container]:
    """The container of a supervisor as a caller has it; what runs of it is ended with the block."""
    container = Container(Held(made))
    async with container._life:
        yield container


async def run(
    image: ImageSource,
    *command: str,
    input: bytes = b"",
    check: bool = False,
    name: str = "",
    **options: Unpack[Options],
) -> Completed:
    """Run a container in a virtual machine of its own to its end, and keep its output: at most OUTPUT_MAX bytes of each
    stream. Nothing of it is left.

    Raises as Container.create; with `check` CommandFailed if its status is not zero.
    """
    async with Container.create(image, *command, name=name, **options) as container:
        process = await container.start(stdin=PIPE if input else None, stdout=PIPE, stderr=PIPE)
        stdout, stderr = await process.communicate(input)
        done = Completed(await process.wait(), stdout, stderr, oom_killed=container.info().oom_killed)
    return checked(done, command) if check else done
