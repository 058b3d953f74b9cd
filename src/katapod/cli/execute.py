"""`kata-runtime exec`: one more process in a running container, or in its VM beside all containers."""

import asyncio
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from katapod.cli.command import argument, flag, option, repeatable, verb
from katapod.cli.settings import Globals, need_root
from katapod.cli.streams import carry_streams, why_cut_off
from katapod.model.errors import KatapodError, NotFound, UsageError
from katapod.model.flags import UserName, parse_env, parse_user, parse_workdir

if TYPE_CHECKING:
    from katapod.cli.vm_shell import VmShell
    from katapod.model.oci import Box, Process
    from katapod.sandbox.client import ControlClient
    from katapod.sandbox.stdio import GuestProcess

__all__ = ["execute"]

VPORT_MAX = 2**32 - 2


@dataclass(frozen=True, slots=True)
class ExecFlags:
    """The command line, as click has read it: a field for each parameter of execute()."""

    name: str
    command: tuple[str, ...]
    interactive: bool
    tty: bool
    env: tuple[str, ...]
    workdir: str
    user: str
    privileged: bool
    in_vm: bool
    vport: int


@verb("exec", context_settings={"allow_interspersed_args": False})
@argument("name", metavar="NAME", help="A running container or pod, by name or id.")
@argument("command", nargs=-1, metavar="[COMMAND...]", help="The command and its arguments.")
@flag("-i", "--interactive", help="Keep standard input open.")
@flag("-t", "--tty", help="Give the command a terminal.")
@repeatable("-e", "--env", metavar="K[=V]", help="Set a variable.")
@option("-w", "--workdir", metavar="DIR", help="Working directory.")
@option("-u", "--user", metavar="USER[:GROUP]", help="User, by name or id.")
@flag("--privileged", help="All rights inside the VM.")
@flag("--vm", "in_vm", help="In the VM, not in the container.")
@option(
    "--kata-debug-port",
    "vport",
    metavar="PORT",
    type=click.IntRange(0, VPORT_MAX),
    default=0,
    help="In the VM; its debug console is on this vsock port, 1026 unless the guest was told otherwise.",
)
@click.pass_obj
def execute(settings: Globals, /, **parameters: Any) -> int:
    """Run a command in a running container; the exit status is the command's.

    Without COMMAND, with --vm, and for a pod as a whole it runs in the VM, beside all containers, as root: a shell
    if there is no COMMAND. That takes a debug console, which is off unless debug_console_enabled in
    configuration.toml switches it on. With a terminal at both ends it gets one, and standard input is open for a
    shell.
    """
    flags = ExecFlags(**parameters)
    need_root("exec")
    from katapod.sandbox.lookup import find_sandbox

    if flags.tty and flags.interactive and not os.isatty(0):
        raise UsageError("cannot use -t with -i: standard input is not a terminal", hint="leave out -t")
    found = find_sandbox(settings.states(), flags.name)
    if found.record.pooled:
        raise KatapodError(f"cannot use {flags.name}: it is a machine of the pool, and nobody's sandbox yet")
    container_id = found.container_id or ("" if found.record.pod else found.record.sandbox_id)
    if flags.in_vm or flags.vport or not flags.command or not container_id:
        from katapod.cli.vm_shell import run_in_vm

        return run_in_vm(settings, found.record, _shell(flags))
    user = parse_user(flags.user) if flags.user else None
    env = parse_env(flags.env, os.environ)
    return asyncio.run(_exec(settings, found.record.sandbox_id, container_id, flags, user, env))


def _shell(flags: ExecFlags) -> "VmShell":
    """What is to run in the VM. Raises UsageError for flags that only a container can have."""
    from katapod.cli.vm_shell import VmShell

    if flags.user or flags.privileged:
        wrong = "-u" if flags.user else "--privileged"
        raise UsageError(f"cannot use {wrong} in the VM: there everything runs as root, with all rights")
    both = os.isatty(0) and os.isatty(1)
    return VmShell(
        flags.command,
        dict(entry.split("=", 1) for entry in parse_env(flags.env, os.environ)),
        parse_workdir(flags.workdir) if flags.workdir else "",
        interactive=flags.interactive or not flags.command or both,
        tty=flags.tty or both,
        vport=flags.vport,
    )


async def _exec(
    settings: Globals, sandbox_id: str, container_id: str, flags: ExecFlags, user: UserName | None, env: tuple[str, ...]
) -> int:
    """Start it, carry its streams, and return its exit status. Raises NotFound, KatapodError."""
    from katapod.rpc.status import RpcError
    from katapod.sandbox.client import connect_control

    async with connect_control(settings.states(), sandbox_id) as client:
        process = _plan_process(settings, sandbox_id, container_id, flags, user, env)
        try:
            running = await _start(client, container_id, process, user)
        except NotFound as exc:
            cause = await why_cut_off(client, exc, "it has ended")
            raise NotFound(f"cannot exec in container {flags.name}: {cause}") from exc
        try:
            return await carry_streams(running, interactive=flags.interactive)
        except RpcError as exc:
            cause = await why_cut_off(client, exc, "the container has ended")
            raise KatapodError(f"the command in {flags.name} was cut off: {cause}") from exc


def _plan_process(
    settings: Globals, sandbox_id: str, container_id: str, flags: ExecFlags, user: UserName | None, env: tuple[str, ...]
) -> "Process":
    """The process, with environment and rights of the container's. Raises NotFound if that has ended."""
    from katapod.model.oci import parse_spec
    from katapod.plan.container_spec import numeric_user, plan_exec_process

    path = settings.layout.sandbox(sandbox_id).spec(container_id)
    try:
        spec = parse_spec(path.read_bytes(), str(path))
    except FileNotFoundError as exc:
        raise NotFound(f"cannot exec in container {flags.name}: it has ended") from exc
    return plan_exec_process(
        spec,
        flags.command,
        env=env,
        cwd=parse_workdir(flags.workdir) if flags.workdir else "",
        user=numeric_user(user) if user else None,
        tty=flags.tty,
        console_size=_terminal_size() if flags.tty else None,
        privileged=flags.privileged,
    )


def _terminal_size() -> "Box | None":
    from katapod.model.oci import Box

    if not os.isatty(0):
        return None
    size = os.get_terminal_size(0)
    return Box(height=size.lines, width=size.columns)


async def _start(
    client: "ControlClient", container_id: str, process: "Process", user: UserName | None
) -> "GuestProcess":
    from katapod.rpc.oci_message import process_to_message
    from katapod.sandbox.client import start_exec

    ran_as = next((item for item in client.record.containers if item.container_id == container_id), None)
    who = f"{user.user}:{user.group or ''}".rstrip(":") if user else ""
    who = who or (ran_as.user if ran_as else "")  # a name has no number yet in the spec on this side
    groups = ran_as.groups if ran_as else ()
    message = process_to_message(process)
    # no time limit: the owner may have many to start before
    return await start_exec(client.agent, container_id, message, user=who, groups=groups, timeout_s=None)
