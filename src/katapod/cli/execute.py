"""`kata-runtime exec`: one more process in a running container, or in its VM beside all containers."""

import asyncio
import os
from typing import Annotated

import typer

from katapod.cli.settings import Globals, need_root
from katapod.cli.streams import carry_streams, why_cut_off
from katapod.model.errors import KatapodError, NotFound, UsageError
from katapod.model.flags import parse_env, parse_user, parse_workdir

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command(
        "exec",
        context_settings={"allow_interspersed_args": False},
        short_help="Run a command in a running container, or open a shell in a VM.",
    )(execute)


def execute(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A running container or pod, by name or id.")],
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[COMMAND...]", help="The command and its arguments.")
    ] = None,
    interactive: Annotated[bool, typer.Option("-i", "--interactive", help="Keep standard input open.")] = False,
    tty: Annotated[bool, typer.Option("-t", "--tty", help="Give the command a terminal.")] = False,
    env: Annotated[list[str] | None, typer.Option("-e", "--env", metavar="K[=V]", help="Set a variable.")] = None,
    workdir: Annotated[str, typer.Option("-w", "--workdir", metavar="DIR", help="Working directory.")] = "",
    user: Annotated[str, typer.Option("-u", "--user", metavar="USER[:GROUP]", help="User, by name or id.")] = "",
    privileged: Annotated[bool, typer.Option("--privileged", help="All rights inside the VM.")] = False,
    in_vm: Annotated[bool, typer.Option("--vm", help="In the VM, not in the container.")] = False,
    vport: Annotated[
        int,
        typer.Option(
            "--kata-debug-port",
            min=0,
            max=2**32 - 2,
            metavar="PORT",
            show_default=False,
            help="In the VM; its debug console is on this vsock port, 1026 unless the guest was told otherwise.",
        ),
    ] = 0,
) -> int:
    """Run a command in a running container; the exit status is the command's.

    Without COMMAND, with --vm, and for a pod as a whole it runs in the VM, beside all containers, as root: a shell
    if there is no COMMAND. That takes a debug console, which is off unless debug_console_enabled in
    configuration.toml switches it on. With a terminal at both ends it gets one, and standard input is open for a
    shell.
    """
    need_root("exec")
    from katapod.sandbox.lookup import find_sandbox

    settings: Globals = context.obj
    if tty and interactive and not os.isatty(0):
        raise UsageError("cannot use -t with -i: standard input is not a terminal", hint="leave out -t")
    found = find_sandbox(settings.states(), name)
    if found.record.pooled:
        raise KatapodError(f"cannot use {name}: it is a machine of the pool, and nobody's sandbox yet")
    container_id = found.container_id or ("" if found.record.pod else found.record.sandbox_id)
    if in_vm or vport or not command or not container_id:
        from katapod.cli.vm_shell import VmShell, run_in_vm

        if user or privileged:
            flag = "-u" if user else "--privileged"
            raise UsageError(f"cannot use {flag} in the VM: there everything runs as root, with all rights")
        both = os.isatty(0) and os.isatty(1)
        shell = VmShell(
            tuple(command or ()),
            dict(entry.split("=", 1) for entry in parse_env(env or [], os.environ)),
            parse_workdir(workdir) if workdir else "",
            interactive=interactive or not command or both,
            tty=tty or both,
            vport=vport,
        )
        return run_in_vm(settings, found.record, shell)
    checked_user = parse_user(user) if user else None
    checked_env = parse_env(env or [], os.environ)

    async def go() -> int:
        from katapod.model.oci import Box, parse_spec
        from katapod.plan.container_spec import numeric_user, plan_exec_process
        from katapod.rpc.oci_message import process_to_message
        from katapod.rpc.status import RpcError
        from katapod.sandbox.client import connect_control, start_exec

        store, sandbox_id = settings.states(), found.record.sandbox_id
        async with connect_control(store, sandbox_id) as client:
            path = store.layout.sandbox(sandbox_id).spec(container_id)
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
            ran_as = next((item for item in client.record.containers if item.container_id == container_id), None)
            who = f"{checked_user.user}:{checked_user.group or ''}".rstrip(":") if checked_user else ""
            who = who or (ran_as.user if ran_as else "")  # a name has no number yet in the spec on this side
            groups = ran_as.groups if ran_as else ()
            message = process_to_message(process)
            try:
                # no time limit: the owner may have many to start before
                running = await start_exec(client.agent, container_id, message, user=who, groups=groups, timeout_s=None)
            except NotFound as exc:
                cause = await why_cut_off(client, exc, "it has ended")
                raise NotFound(f"cannot exec in container {name}: {cause}") from exc
            try:
                return await carry_streams(running, interactive=interactive)
            except RpcError as exc:
                cause = await why_cut_off(client, exc, "the container has ended")
                raise KatapodError(f"the command in {name} was cut off: {cause}") from exc

    return asyncio.run(go())
