"""`kata-runtime exec`: one more process in a running container."""

import asyncio
import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from katapod.cli.settings import Globals, need_root
from katapod.model.errors import KatapodError, NotFound, UsageError
from katapod.model.flags import parse_env, parse_user, parse_workdir
from katapod.model.ids import parse_container_name

if TYPE_CHECKING:
    from katapod.rpc.status import RpcError
    from katapod.sandbox.client import ControlClient
    from katapod.sandbox.stdio import GuestProcess

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command(
        "exec",
        context_settings={"allow_interspersed_args": False},
        short_help="Run a command in a running container.",
    )(execute)


def execute(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A running container.")],
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="The command and its arguments.")],
    interactive: Annotated[bool, typer.Option("-i", "--interactive", help="Keep standard input open.")] = False,
    tty: Annotated[bool, typer.Option("-t", "--tty", help="Give the command a terminal.")] = False,
    env: Annotated[list[str] | None, typer.Option("-e", "--env", metavar="K[=V]", help="Set a variable.")] = None,
    workdir: Annotated[str, typer.Option("-w", "--workdir", metavar="DIR", help="Working directory.")] = "",
    user: Annotated[str, typer.Option("-u", "--user", metavar="USER[:GROUP]", help="User, by name or id.")] = "",
    privileged: Annotated[bool, typer.Option("--privileged", help="All rights inside the VM.")] = False,
) -> int:
    """Run a command in a running container; the exit status is the command's."""
    need_root("exec")
    if tty and interactive and not os.isatty(0):
        raise UsageError("cannot use -t with -i: standard input is not a terminal", hint="leave out -t")
    checked_user = parse_user(user) if user else None
    checked_env = parse_env(env or [], os.environ)
    settings: Globals = context.obj

    async def go() -> int:
        from katapod.model.oci import Box, parse_spec
        from katapod.plan.container_spec import numeric_user, plan_exec_process
        from katapod.rpc.oci_message import process_to_message
        from katapod.rpc.status import RpcError
        from katapod.sandbox.client import connect_control, start_exec

        store = settings.states()
        parse_container_name(name)
        async with connect_control(store, name) as client:
            path = store.layout.sandbox(name).spec(name)
            try:
                spec = parse_spec(path.read_bytes(), str(path))
            except FileNotFoundError as exc:
                raise NotFound(f"cannot exec in container {name}: it has ended") from exc
            box = None
            if tty and os.isatty(0):
                size = os.get_terminal_size(0)
                box = Box(height=size.lines, width=size.columns)
            process = plan_exec_process(
                spec,
                tuple(command),
                env=checked_env,
                cwd=parse_workdir(workdir) if workdir else "",
                user=numeric_user(checked_user) if checked_user else None,
                tty=tty,
                console_size=box,
                privileged=privileged,
            )
            who = f"{checked_user.user}:{checked_user.group or ''}".rstrip(":") if checked_user else ""
            running = await start_exec(client.agent, name, process_to_message(process), user=who)
            try:
                return await _carry(running, interactive=interactive)
            except RpcError as exc:
                raise KatapodError(f"the command in {name} was cut off: {await _why_cut_off(client, exc)}") from exc

    return asyncio.run(go())


async def _why_cut_off(client: "ControlClient", error: "RpcError") -> str:
    from katapod.host.state import owner_alive
    from katapod.model.record import State

    if not client.connection.closed.done():
        return error.message
    # The owner ends the connection when its container has ended, and says so in the record, or it was killed.
    for _ in range(50):
        record = client.record_now()
        if record is None or all(item.state is State.STOPPED for item in record.containers):
            break
        if not owner_alive(client.paths):
            return "the kata-runtime that runs the container was killed"
        await asyncio.sleep(0.02)
    return "the container has ended"


async def _carry(process: "GuestProcess", *, interactive: bool) -> int:
    """Carry the streams, pass signals on, and lend the terminal for the time."""
    from katapod.cli.terminal import follow_size, raw_terminal
    from katapod.rpc.status import RpcError
    from katapod.sandbox.stdio import InputFd, OutputFd, carry

    loop = asyncio.get_running_loop()
    sending: set[asyncio.Task[None]] = set()
    seen = 0

    async def forward(number: int) -> None:
        with contextlib.suppress(RpcError):
            await process.signal(number)

    def on_signal(number: signal.Signals) -> None:
        nonlocal seen
        seen += 1
        task = asyncio.create_task(forward(signal.SIGKILL if seen > 2 else number), name="forward")
        sending.add(task)
        task.add_done_callback(sending.discard)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        loop.add_signal_handler(number, on_signal, number)
    with contextlib.ExitStack() as stack:
        if process.terminal and os.isatty(0):
            if interactive:
                stack.enter_context(raw_terminal(0))
            stack.enter_context(follow_size(process, 0))
        try:
            return await carry(process, InputFd(0) if interactive else None, OutputFd(1), OutputFd(2))
        except BrokenPipeError:
            await forward(signal.SIGKILL)
            sys.stderr.close()
            return 141
