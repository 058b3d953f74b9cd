"""Options as values: one declaration is the parser's, --help's and that of the table for people who know docker.

What cannot be had here is declared as well, with the reason and with what does it instead; so it is refused in one
line, and not taken for a mistake in writing.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import click

from katapod.cli.command import HOST_PATH, F
from katapod.model.errors import UsageError

__all__ = ["Declared", "declared", "refused", "takes"]


class Declared(NamedTuple):
    """`metavar` is empty for a switch. `several`: it may be given again. `any_bytes`: its value ends in a path.

    One that is refused has a `cause`, and a `way` that works here; `meant` are values that ask for what happens anyway,
    which are taken: "false" for a switch. `note` says in the table what differs from docker.
    """

    names: tuple[str, ...]
    help: str = ""
    metavar: str = ""
    several: bool = False
    any_bytes: bool = False
    default: Any = ""
    envvar: str = ""
    meant: tuple[str, ...] = ()
    cause: str = ""
    way: str = ""
    note: str = ""

    @property
    def shown(self) -> str:
        return ", ".join(name for name in self.names if name.startswith("-"))


def takes(*names: str, help: str, metavar: str = "", note: str = "", **more: Any) -> Declared:
    """One that works."""
    return Declared(names, help, metavar, note=note, **more)


def refused(*names: str, cause: str, way: str, metavar: str = "X", meant: tuple[str, ...] = ("",)) -> Declared:
    """One that is taken for what is `meant` only."""
    return Declared(names, metavar=metavar, meant=meant, cause=cause, way=way)


def declared(options: Iterable[Declared]) -> Callable[[F], F]:
    """Give a verb these options, in their order."""

    def decorate(function: F) -> F:
        for each in reversed(list(options)):
            function = _option(each)(function)
        return function

    return decorate


def _option(each: Declared) -> Callable[[F], F]:
    if each.cause:
        # is_flag=False would mean an option whose value may be left out
        kind: dict[str, Any] = {"multiple": True, "type": HOST_PATH} if each.metavar else {"is_flag": True}
        return click.option(*each.names, hidden=True, expose_value=False, callback=_refuse(each), **kind)
    if not each.metavar:
        default = False if each.default == "" else each.default
        return click.option(*each.names, is_flag=True, flag_value=True, help=each.help, default=default)
    return click.option(
        *each.names,
        metavar=each.metavar,
        help=each.help,
        multiple=each.several,
        type=HOST_PATH if each.any_bytes else None,
        default=None if each.several else each.default,
        envvar=each.envvar or None,
        show_envvar=bool(each.envvar),
    )


def _refuse(each: Declared) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(context: click.Context, _: click.Parameter, given: Any) -> None:
        if context.resilient_parsing:
            return
        values = given if isinstance(given, tuple) else ("",) if given else ()
        for value in values:
            if each.metavar and value in each.meant:
                continue
            name = next(name for name in reversed(each.names) if name.startswith("-"))
            raise UsageError(f"cannot use {name}{f' {value[:200]}' if value else ''}: {each.cause}", hint=each.way)

    return callback
