"""What verbs are declared with: click's commands and options, and what all of ours have in common.

Arguments have a help text, which click shows for options only. Text is UTF-8 unless a parameter is a HOST_PATH. An
option that takes a text and is not given is "", or () where it may be given several times.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from katapod.model.text import need_text

__all__ = [
    "HOST_PATH",
    "Argument",
    "Command",
    "F",
    "Group",
    "argument",
    "flag",
    "group",
    "option",
    "repeatable",
    "verb",
]

F = TypeVar("F", bound=Callable[..., Any])
"""What is declared: the function of a verb."""


class _HostPath(click.ParamType):
    """A path of this host, or what begins or ends with one: any bytes, and the verb looks at the rest."""

    name = "text"


HOST_PATH = _HostPath()


class Argument(click.Argument):
    """With a line of help, in place of click's sentence about it in the docstring."""

    def __init__(self, names: list[str], *, help: str = "", **attributes: Any) -> None:
        super().__init__(names, **attributes)
        self.help = help


class Command(click.Command):
    """A verb: its arguments are explained, and what has to be text is."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        arguments = [parameter for parameter in self.params if isinstance(parameter, Argument)]
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl([(one.make_metavar(ctx), _help(one)) for one in arguments])
        super().format_options(ctx, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        """Refuse what is no text before anything is done. Raises UsageError with the name of the flag."""
        for parameter in self.params:
            if parameter.name is None or parameter.type is HOST_PATH:
                continue
            given = ctx.params.get(parameter.name)
            name = parameter.opts[0] if isinstance(parameter, click.Option) else parameter.name.upper()
            for one in given if isinstance(given, tuple) else (given,):
                if isinstance(one, str):
                    need_text(name, one)
        return super().invoke(ctx)


class Group(click.Group):
    """Its commands are listed in the order in which they are declared."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


Group.group_class = Group


def _help(one: Argument) -> str:
    return f"{one.help}  [required]".lstrip() if one.required else one.help


def group(**attributes: Any) -> Callable[[Callable[..., Any]], Group]:
    """Declare a family of verbs; the function's docstring is its help."""
    return click.group(cls=Group, **attributes)


def verb(name: str, **attributes: Any) -> Callable[[Callable[..., Any]], Command]:
    """Declare a verb; the function's docstring is its help."""
    return click.command(name, cls=Command, **attributes)


def argument(name: str, *, help: str = "", **attributes: Any) -> Callable[[F], F]:
    return click.argument(name, cls=Argument, help=help, **attributes)


def flag(*names: str, help: str, **attributes: Any) -> Callable[[F], F]:
    """An option that is there or not: True or False."""
    return click.option(*names, is_flag=True, help=help, **attributes)


def option(*names: str, metavar: str, help: str, **attributes: Any) -> Callable[[F], F]:
    """An option that takes a value."""
    if not attributes.get("required"):
        attributes.setdefault("default", "")
    return click.option(*names, metavar=metavar, help=help, **attributes)


def repeatable(*names: str, metavar: str, help: str, **attributes: Any) -> Callable[[F], F]:
    """An option that takes a text, and may be given several times."""
    return click.option(*names, metavar=metavar, help=help, multiple=True, **attributes)
