"""A member of the pool: a process that has a machine ready, and then owns the container of the client that takes it.

It is forked by the server (pool_server.py) with every module loaded. To the server it says `ready`, with what
`factory status` shows, and `taken`; the server passes it a client's connection. Until it is taken it ends with the
server: the end of their socket tells it. Afterwards it goes on alone, as the process of any `run` does.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from katapod import __version__
from katapod.host.facts import HostFacts, collect_host_facts
from katapod.host.own_mounts import in_host_mounts, leave_host_mounts
from katapod.host.priority import leave_background, stay_in_background
from katapod.host.trace import span, start_tracing
from katapod.model.config import Config, check_paths, load_config
from katapod.model.errors import KatapodError, NoSpace
from katapod.model.ids import ContainerId
from katapod.plan.container_spec import ContainerOptions
from katapod.sandbox.ladder import needs_of_config
from katapod.sandbox.planning import SandboxPlan, plan_ready_machine
from katapod.sandbox.pool import ReadyMachine, new_machine_id, ready_machine, warm_up
from katapod.sandbox.proof import choose_accelerator, wanted_accelerator
from katapod.sandbox.start_record import new_record
from katapod.sandbox.template_build import prepare_template
from katapod.sandbox.template_store import TemplateBroken
from katapod.supervisor import pool_wire as wire
from katapod.supervisor.container_source import prepare_container
from katapod.supervisor.pool_peer import Client, read_request
from katapod.supervisor.run import ENDING, background_streams, cancel_once, own_container, run_attached
from katapod.supervisor.run_context import KeepRun, RunContext
from katapod.supervisor.run_request import RunRequest
from katapod.tasks import beside, end_tasks

__all__ = ["CommandLine", "MemberReport", "member_main"]

log = logging.getLogger(__name__)

REQUEST_LIMIT_S = 2.0  # for a client that has connected to say what it wants
GO_LIMIT_S = 10.0  # for its word that we may begin: once it has given that, it does not go back
WEAR_PERIOD_S = 60.0  # between looks whether the machine is still what a new start would give
WARM_UP_IMAGE = "busybox"  # the image that is always there


class MemberReport(msgspec.Struct, frozen=True):
    """What the server hears when a machine is ready."""

    machine_id: str
    vmm_pid: int
    vcpus: int
    mem_mib: int


class _Inputs(Struct, frozen=True):
    """What a machine is started for, and has to be the same when it is taken."""

    config: Config
    facts: HostFacts
    marks: list[bytes]


class CommandLine(Struct, frozen=True):
    """The program that a client was called as: `call` carries out words, but for a run, which it hands over."""

    call: Callable[[list[str], KeepRun], int]
    explain: Callable[[BaseException, str], int]
    flush_output: Callable[[int], int]


def member_main(context: RunContext, command_line: CommandLine, control: socket.socket) -> int:
    """The life of the forked process; returns its exit status: 0 unless the server should tidy up and wait."""
    try:
        leave_host_mounts()
        return asyncio.run(_Member(context, command_line, control).live())
    except (asyncio.CancelledError, KeyboardInterrupt):
        return 0
    except Exception as exc:
        command_line.explain(exc, "factory")
        return 1


class _Member:
    def __init__(self, context: RunContext, command_line: CommandLine, control: socket.socket) -> None:
        self.context = context
        self.command_line = command_line
        self.control = control
        self.control.setblocking(False)
        self.store = context.states()

    async def live(self) -> int:
        main = asyncio.current_task()
        assert main is not None
        loop = asyncio.get_running_loop()
        for number in ENDING:
            loop.add_signal_handler(number, cancel_once, main)
        async with beside(self._watch_server(main), name="watch-server") as watch:
            return await self._make(watch)

    async def _make(self, watch: "asyncio.Task[None]") -> int:
        """Make a machine, and serve who takes it; `watch` ends before we listen to the server."""
        inputs = self._collect_inputs()
        plan = await self._plan(inputs)
        if plan.template is not None:
            with contextlib.suppress(TemplateBroken, NoSpace):  # ready_machine says so, and boots its guest
                await prepare_template(plan.template)  # others wait for it, and so should not wait for the background
        stay_in_background()
        async with ready_machine(plan, self.store) as ready:
            stay_in_background()  # those that were started, too: a session each, with an autogroup of its own
            await self._warm_up(inputs, ready)
            await ready.pause()
            leave_background()
            await end_tasks({watch})
            client = await self._wait_taken(inputs, ready)
            if client is None:
                return 0
            with client:
                status = await self._carry_out(client, ready)
                client.end(status)
        return 0

    async def _watch_server(self, main: "asyncio.Task[int]") -> None:
        """Nobody needs a member in the making whose server has gone."""
        await _readable(self.control)
        cancel_once(main)

    def _collect_inputs(self) -> _Inputs:
        chosen = self.context.config_file
        marks = [wire.fingerprint(wire.config_files(chosen)), *in_host_mounts(wire.namespaces)]
        config = check_paths(load_config(Path(chosen) if chosen else None), os.path.exists)
        return _Inputs(config, collect_host_facts(), marks)

    async def _plan(self, inputs: _Inputs) -> SandboxPlan:
        choice = await choose_accelerator(
            wanted_accelerator(inputs.config),
            inputs.config,
            inputs.facts,
            self.store.layout.proof_file,
            Path(tempfile.gettempdir()),
            needs=needs_of_config(inputs.config),
        )
        if choice.fresh:
            self.context.tell(choice.describe())
        return plan_ready_machine(
            new_record(new_machine_id(), inputs.facts, auto_remove=True, pooled=True),
            inputs.config,
            inputs.facts,
            self.store.layout,
            accelerator=choice.accelerator,
            remedy=choice.remedy,
            proof_key=choice.key,
        )

    async def _warm_up(self, inputs: _Inputs, ready: ReadyMachine) -> None:
        """Run a container in it that does nothing. Without its image the machine is as good, if less quick."""
        machine_id = ContainerId(ready.machine_id)
        request = RunRequest(
            container_id=machine_id,
            image=WARM_UP_IMAGE,
            rootfs=None,
            bundle=None,
            options=ContainerOptions(args=("true",), hostname="warm-up"),
            remove=True,
            interactive=False,
            accel="",
            labels={},
            stop_signal=None,
        )
        try:
            plan = await prepare_container(self.context, inputs.config, request, None)
        except KatapodError as exc:
            log.info("not warmed up: %s", exc)
            return
        try:
            await warm_up(ready, plan)
        finally:
            await self.context.image_store().release(machine_id)

    async def _wait_taken(self, inputs: _Inputs, ready: ReadyMachine) -> Client | None:
        """Wait for a client that the machine fits; None when there is none to wait for any more."""
        self._report_ready(ready)
        born = time.monotonic()
        death = ready.machine.death
        while True:
            async with beside(_readable(self.control), name="wait-request") as readable:
                waiting: set[asyncio.Future[Any]] = {readable, death}
                await asyncio.wait(waiting, timeout=WEAR_PERIOD_S, return_when=asyncio.FIRST_COMPLETED)
            if death.done():
                raise death.result()
            if readable.cancelled():
                if await self._is_worn(inputs, ready, time.monotonic() - born):
                    return None
                continue
            _, fds, _, _ = socket.recv_fds(self.control, 16, 1)
            if not fds:
                return None
            client = await self._take(socket.socket(fileno=fds[0]), inputs, ready)
            if client is not None:
                return client
            if await self._is_worn(inputs, ready, time.monotonic() - born):
                return None
            self._report_ready(ready)

    def _report_ready(self, ready: ReadyMachine) -> None:
        machine = ready.machine
        report = MemberReport(ready.machine_id, machine.vm.pid, machine.spec.vcpus, machine.mem_mib)
        self._tell(msgspec.json.encode(report))

    def _tell(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # the server has gone: what we read next is the end
            self.control.send(data)

    async def _is_worn(self, inputs: _Inputs, ready: ReadyMachine, age_s: float) -> bool:
        """Whether a new start would give another machine, or the template's time is over."""
        try:
            now = self._collect_inputs()
            worn = now.marks != inputs.marks or (await self._plan(now)).machine_key != ready.plan.machine_key
        except (OSError, KatapodError) as exc:
            log.info("%s is given up: %s", ready.machine_id, exc)
            return True
        return worn or age_s > inputs.config.katapod.template_max_age * 60

    async def _take(self, connection: socket.socket, inputs: _Inputs, ready: ReadyMachine) -> Client | None:
        """Agree with a client; None if it has to do without us."""
        client = Client(connection)
        try:
            request, client.fds = await asyncio.to_thread(read_request, connection, REQUEST_LIMIT_S)
            client.request = request
            if (request.version, request.marks) != (__version__.encode(), inputs.marks):
                client.refuse()
                return None
            await asyncio.to_thread(client.agree, GO_LIMIT_S)
        except (OSError, wire.FrameError) as exc:
            log.debug("a client went away: %s", exc)
            client.close()
            return None
        self._tell(b"taken")
        self.control.close()
        return client

    async def _carry_out(self, client: Client, ready: ReadyMachine) -> int:
        """What `kata-runtime WORDS` would do in the client's process; returns its exit status."""
        flush = self.command_line.flush_output
        kept: list[tuple[RunContext, RunRequest, bool]] = []

        def keep(context: RunContext, request: RunRequest, detach: bool) -> None:
            kept.append((context, request, detach))

        try:
            async with ready.asked_for():
                client.become()
                start_tracing(interpreter=False)
                with span("read the command line"):
                    status = self.command_line.call(client.words, keep)
                if not kept:
                    return flush(status)
                context, request, detach = kept[0]
                if detach:
                    run = _run_detached(context, request, ready, client)
                else:
                    run = run_attached(context, request, ready)
                async with beside(run, name="carry-out") as task:
                    client.follow(task)
                    return flush(await task)
        except asyncio.CancelledError:
            return 128 + (client.signals[0] if client.signals else signal.SIGTERM)
        except Exception as exc:
            return flush(self.command_line.explain(exc, "run"))


async def _run_detached(context: RunContext, request: RunRequest, ready: ReadyMachine, client: Client) -> int:
    """The client ends when the container runs; we go on. Raises what keeps it from running."""

    told: list[bool] = []

    def started(_: object) -> None:
        if told:  # its policy has started it again
            return
        told.append(True)
        status = 0
        try:
            os.write(1, f"{request.container_id}\n".encode())
        except OSError:
            status = 128 + signal.SIGPIPE
        client.end(status)
        client.leave_streams()

    task = asyncio.current_task()
    assert task is not None
    for number in ENDING:
        asyncio.get_running_loop().add_signal_handler(number, cancel_once, task)
    await own_container(context, request, background_streams, started, ready)
    return 0


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def fulfil() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock, fulfil)
    try:
        await ready
    finally:
        loop.remove_reader(sock)
