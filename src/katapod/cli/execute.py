"""`kata-runtime exec`: one more process in a running container, or in its VM beside all containers."""

import asyncio
import os
from typing import TYPE_CHECKING, Any

import click
from msgspec import Struct

from katapod.cli.command import HOST_PATH, argument, flag, option, repeatable, verb
from katapod.cli.settings import Globals, need_root
from katapod.model.errors import KatapodError, UsageError
from katapod.model.flags import parse_env, parse_user, parse_workdir

if TYPE_CHECKING:
    from collections.abc import Mapping

    from katapod.cli.vm_shell import VmShell
    from katapod.model.oci import Box
    from katapod.sandbox.execs import ExecRequest

__all__ = ["ExecFlags", "exec_request", "execute"]

VPORT_MAX = 2**32 - 2


class ExecFlags(Struct, frozen=True):
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
    detach: bool = False
    env_file: tuple[str, ...] = ()
    detach_keys: str = ""


@verb("exec", context_settings={"allow_interspersed_args": False})
@argument("name", metavar="NAME", help="Name or ID of a running container or pod.")
@argument("command", nargs=-1, metavar="[COMMAND...]", help="The command and its arguments.")
@flag("-i", "--interactive", help="Keep standard input open.")
@flag("-t", "--tty", help="Allocate a terminal for the command.")
@flag("-d", "--detach", help="Run in the background.")
@repeatable("-e", "--env", metavar="K[=V]", help="Set an environment variable.")
@repeatable("--env-file", metavar="FILE", type=HOST_PATH, help="Read environment variables from a file.")
@option("--detach-keys", metavar="KEYS", help="Taken if it is empty: a process in the foreground is not left.")
@option("-w", "--workdir", metavar="DIR", help="Working directory.")
@option("-u", "--user", metavar="USER[:GROUP]", help="User name or ID.")
@flag("--privileged", help="All privileges inside the VM.")
@flag("--vm", "in_vm", help="Run in the VM, not in the container.")
@option(
    "--kata-debug-port",
    "vport",
    metavar="PORT",
    type=click.IntRange(0, VPORT_MAX),
    default=0,
    help="Run in the VM, by the debug console on this vsock port; usually 1026.",
)
@click.pass_obj
def execute(settings: Globals, /, **parameters: Any) -> int:
    """Run a command in a running container; the exit status is the command's.

    Without COMMAND, with --vm, or with the name of a pod, the command runs in the VM itself, beside all containers, as
    root; without COMMAND it is a shell. This needs the debug console, which is off unless configuration.toml has
    debug_console_enabled = true. The command gets a terminal if standard input and output are terminals, and a shell
    always has standard input.
    """
    flags = ExecFlags(**parameters)
    if settings.keep_exec is not None:
        settings.keep_exec(flags)
        return 0
    need_root("exec")
    from katapod.sandbox.lookup import find_sandbox

    if flags.detach_keys:
        raise UsageError(
            "cannot use --detach-keys: a process in the foreground is not left",
            hint="exec -d runs one in the background",
        )
    if flags.detach and (flags.interactive or flags.in_vm or flags.vport or not flags.command):
        raise UsageError("cannot use -d with -i or for a shell: a process in the background has no standard input")

    if flags.tty and flags.interactive and not os.isatty(0):
        raise UsageError("cannot use -t with -i: standard input is not a terminal", hint="omit -t")
    found = find_sandbox(settings.states(), flags.name)
    if found.record.pooled:
        raise KatapodError(f"cannot use {flags.name}: it is an idle machine of the pool")
    container_id = found.container_id or ("" if found.record.pod else found.record.sandbox_id)
    if flags.in_vm or flags.vport or not flags.command or not container_id:
        from katapod.cli.vm_shell import run_in_vm

        return run_in_vm(settings, found.record, _shell(flags))
    request = exec_request(flags, os.environ)
    if flags.detach:
        from katapod.supervisor.exec_background import exec_in_background

        return exec_in_background(settings.states(), flags.name, found.record.sandbox_id, container_id, request)
    return asyncio.run(_exec(settings, found.record.sandbox_id, container_id, flags, request))


def _shell(flags: ExecFlags) -> "VmShell":
    """What is to run in the VM. Raises UsageError for flags that only a container can have."""
    from katapod.cli.vm_shell import VmShell

    if flags.user or flags.privileged:
        wrong = "-u" if flags.user else "--privileged"
        raise UsageError(f"cannot use {wrong} in the VM: everything there runs as root with all privileges")
    both = os.isatty(0) and os.isatty(1)
    return VmShell(
        flags.command,
        dict(entry.split("=", 1) for entry in parse_env(flags.env, os.environ)),
        parse_workdir(flags.workdir) if flags.workdir else "",
        interactive=flags.interactive or not flags.command or both,
        tty=flags.tty or both,
        vport=flags.vport,
    )


async def _exec(settings: Globals, sandbox_id: str, container_id: str, flags: ExecFlags, request: "ExecRequest") -> int:
    """Start it, carry its streams, and return its exit status. Raises NotFound, KatapodError."""
    from katapod.supervisor.exec_run import started_exec
    from katapod.supervisor.foreground import carry_streams

    async with started_exec(settings.states(), flags.name, sandbox_id, container_id, request) as running:
        return await carry_streams(running, interactive=flags.interactive)


def exec_request(flags: ExecFlags, environ: "Mapping[str, str]") -> "ExecRequest":
    """Raises UsageError."""
    from katapod.cli.env_files import env_files
    from katapod.sandbox.execs import ExecRequest

    return ExecRequest(
        flags.command,
        env=(*env_files(flags.env_file), *parse_env(flags.env, environ)),
        cwd=parse_workdir(flags.workdir) if flags.workdir else "",
        user=parse_user(flags.user) if flags.user else None,
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
