"""Flags and arguments that are text. Only paths of this host may have bytes that are no UTF-8."""

from collections.abc import Iterator
from typing import Any

import click

from katapod.model.flags import need_text

__all__ = ["check_text"]

HOST_PATHS = {"authfile", "bundle", "config", "env_file", "file", "mount_info", "output", "recipe", "rootfs"}
HOST_PATHS |= {"security_opt", "source", "svg", "volume", "volume_path", "words"}
"""Parameters that are one, or begin with one: their verb looks at the rest."""


def check_text(command: click.Command) -> None:
    """Have `command` and those below it refuse other text, by the flag's name, before they do anything."""
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        check_text(below)
    invoke = command.invoke

    def checked(context: click.Context) -> Any:
        for flag, text in _texts(context):
            need_text(flag, text)
        return invoke(context)

    command.invoke = checked  # type: ignore[method-assign,assignment]


def _texts(context: click.Context) -> Iterator[tuple[str, str]]:
    for parameter in context.command.params:
        if parameter.name is None or parameter.name in HOST_PATHS:
            continue
        value = context.params.get(parameter.name)
        flag = parameter.opts[0] if isinstance(parameter, click.Option) else str(parameter.name).upper()
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, str):
                yield flag, one
