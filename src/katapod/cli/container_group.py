"""`kata-runtime container VERB`, as docker has it: the verbs that are about containers."""

import click

from katapod.cli.command import Group
from katapod.cli.program import VERBS, kata_runtime

__all__ = ["container"]

NAMES = {
    **{name: name for name in ("run", "create", "start", "restart", "exec", "wait", "stop", "kill", "pause", "resume")},
    **{name: name for name in ("unpause", "update", "attach", "cp", "export", "port", "top", "stats", "prune", "logs")},
    **{name: name for name in ("inspect", "list", "commit", "diff", "rename", "rm")},
    "ls": "list",
    "ps": "list",
}


class _Containers(Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(NAMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return kata_runtime.get_command(ctx, NAMES[cmd_name]) if cmd_name in NAMES else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, VERBS[NAMES[name]].summary) for name in self.list_commands(ctx)])


@click.group(cls=_Containers)
def container() -> None:
    """Manage containers: each of these is a command of kata-runtime itself, too."""
