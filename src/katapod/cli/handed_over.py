"""Execs that callers hand over to this process, which holds the sandbox: their words, read as the caller would."""

from typing import TYPE_CHECKING

from katapod.cli.settings import Globals

if TYPE_CHECKING:
    from katapod.cli.execute import ExecFlags
    from katapod.supervisor.exec_server import ExecCommand

__all__ = ["read_exec"]


def read_exec(words: list[str]) -> "ExecCommand | None":
    """Read the words behind `exec`; None for what needs more of its caller than its streams.

    Raises what click and the flags raise.
    """
    from katapod.cli.execute import exec_request, execute  # for the first one: a start does not wait for it
    from katapod.supervisor.exec_server import ExecCommand

    kept: list[ExecFlags] = []
    with execute.make_context("exec", list(words), obj=Globals(keep_exec=kept.append)) as context:
        execute.invoke(context)
    flags = kept[0]
    if flags.tty or flags.in_vm or flags.vport or not flags.command or any("=" not in entry for entry in flags.env):
        return None
    return ExecCommand(flags.name, exec_request(flags, {}), flags.interactive)
