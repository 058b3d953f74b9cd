"""The debug console at the caller's end: a shell, or a command, in the VM itself and in no container."""

import asyncio
import contextlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec import Struct

from katapod.cli.settings import Globals
from katapod.model.errors import InvalidState, KatapodError, NotFound, UsageError
from katapod.model.record import SandboxRecord
from katapod.rpc.console import CONSOLE_VPORT

if TYPE_CHECKING:
    from katapod.rpc.pb import oci_pb2

__all__ = ["VmShell", "run_in_vm"]


class VmShell(Struct, frozen=True):
    """What is to run; no `command` means a shell. `vport`: 0, or that of a raw console on vsock."""

    command: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    interactive: bool
    tty: bool
    vport: int


def run_in_vm(settings: Globals, record: SandboxRecord, wanted: VmShell) -> int:
    """Returns the exit status of what ran. Raises KatapodError."""
    return asyncio.run(_run(settings, record, wanted))


async def _run(settings: Globals, record: SandboxRecord, wanted: VmShell) -> int:
    from katapod.rpc.status import RpcError
    from katapod.sandbox.client import connect_control, start_in_vm, why_cut_off
    from katapod.sandbox.errors import ConsoleIsRaw, ConsoleOff
    from katapod.supervisor.foreground import carry_streams

    if wanted.vport not in (0, CONSOLE_VPORT):
        return await _run_raw(settings, record, wanted, wanted.vport)
    async with connect_control(settings.states(), record.sandbox_id) as client:
        try:
            async with start_in_vm(client, _process(wanted)) as process:
                try:
                    return await carry_streams(process, interactive=wanted.interactive, hang_up=not wanted.command)
                except RpcError as exc:
                    cause = await why_cut_off(client, exc, "the sandbox has ended")
                    raise KatapodError(f"the debug console of {record.sandbox_id} was cut off: {cause}") from exc
        except NotFound as exc:
            cause = await why_cut_off(client, exc, "it has ended")
            raise NotFound(f"cannot use the debug console of {record.sandbox_id}: {cause}") from exc
        except ConsoleOff as exc:
            raise InvalidState(str(exc), hint=_how_to_enable(settings, record)) from exc
        except ConsoleIsRaw:
            pass
    return await _run_raw(settings, record, wanted, CONSOLE_VPORT)


def _process(wanted: VmShell) -> "oci_pb2.Process":
    from katapod.rpc.pb import oci_pb2

    env = dict(wanted.env)
    process = oci_pb2.Process(Terminal=wanted.tty, Args=wanted.command, Cwd=wanted.cwd)
    if wanted.tty:
        env.setdefault("TERM", os.environ.get("TERM", "vt100"))
        with contextlib.suppress(OSError):  # -t without one of our own
            size = os.get_terminal_size(0)
            process.ConsoleSize.Height, process.ConsoleSize.Width = size.lines, size.columns
    process.Env.extend(f"{name}={value}" for name, value in env.items())
    return process


def _how_to_enable(settings: Globals, record: SandboxRecord) -> str:
    from katapod.model.config import CONFIG_PATHS

    file = settings.config_file or next((path for path in CONFIG_PATHS if os.path.exists(path)), CONFIG_PATHS[0])
    what, other = (
        ("pod", " (or of the file that the engine names for this runtime)") if record.pod else ("container", "")
    )
    return (
        f"set debug_console_enabled = true in the table [agent.kata] of {file}{other}, then start the {what} again: "
        "it cannot be enabled in a running VM"
    )


async def _run_raw(settings: Globals, record: SandboxRecord, wanted: VmShell, vport: int) -> int:
    """With an agent of upstream, or on a port that is not the usual one: no size, no exit status."""
    from katapod.cli.management import ask
    from katapod.sandbox.raw_console import carry_raw, dial_vsock
    from katapod.supervisor.terminal import raw_terminal

    if wanted.command:
        raise UsageError(
            f"cannot run a command in the VM of {record.sandbox_id}: its debug console is only a raw shell",
            hint="omit the command",
        )
    try:
        url = await asyncio.to_thread(ask, settings, record.sandbox_id, "GET", "/agent-url")
    except KatapodError as exc:
        what = f"cannot reach port {vport} of {record.sandbox_id}"
        raise KatapodError(f"{what}: {exc}", hint="omit --kata-debug-port on a host without vsock") from exc
    connection = await dial_vsock(url.decode(errors="replace"), vport, record.sandbox_id)
    with contextlib.ExitStack() as stack:
        if os.isatty(0):
            stack.enter_context(raw_terminal(0))
        await carry_raw(connection)
    return 0
