"""What verbs are declared with: click's commands and options, and what all of ours have in common.

Arguments have a help text, which click shows for options only. Text is UTF-8 unless a parameter is a HOST_PATH. An
option that takes a text and is not given is "", or () where it may be given several times.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
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
    "near",
    "option",
    "repeatable",
    "verb",
    "without_values",
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
    """A verb: its arguments are explained, what has to be text is, and switches may have a value, as Docker's have."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        words, off = without_values(args, options, interspersed=ctx.allow_interspersed_args)
        try:
            rest = super().parse_args(ctx, words)
        except click.NoSuchOption as exc:
            exc.possibilities = near(
                exc.option_name, (name for each in options if not each.hidden for name in each.opts)
            )
            raise
        for each in options:
            if each.expose_value and each.name in off:
                ctx.params[each.name] = False
        return rest

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

NEAR = 0.8  # of difflib's ratio: one letter of five


def near(word: str, known: Iterable[str], cutoff: float = NEAR) -> list[str]:
    """What somebody who typed `word` has meant, the likeliest first; none where nothing is so near."""
    import difflib

    return difflib.get_close_matches(word, sorted(set(known)), cutoff=cutoff)


def without_values(
    words: list[str], options: list[click.Option], *, interspersed: bool
) -> tuple[list[str], frozenset[str]]:
    """The words with --SWITCH=true as --SWITCH, and without --SWITCH=false; the parameters whose last value was that.

    Not `interspersed`: what follows the first argument is a command's. Raises UsageError for another value.
    """
    switches = {name: each for each in options if each.is_flag or each.count for name in each.opts}
    valued = {name for each in options if not (each.is_flag or each.count) for name in each.opts}
    found, off = list[str](), set[str]()
    rest = iter(words)
    for word in rest:
        if word == "--" or (not interspersed and not _is_option(word)):
            return [*found, word, *rest], frozenset(off)
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            if name in switches:
                truth = not equals or _truth(name, value)
                (off.discard if truth else off.add)(str(switches[name].name))
                found += [name] if truth else []
                continue
            found.append(word)
            if name in valued and not equals:
                found += itertools.islice(rest, 1)
            continue
        found += _short(word, switches, valued, off, rest) if _is_option(word) else [word]
    return found, frozenset(off)


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-"


def _short(
    word: str, switches: dict[str, click.Option], valued: set[str], off: set[str], rest: Iterator[str]
) -> list[str]:
    """A cluster such as -it or -it=false, whose last switch has the value; with the next word, if it is for it."""
    name, equals, value = word.partition("=")
    for place, letter in enumerate(word[1:], 1):
        one = f"-{letter}"
        if one in valued:
            return [word, *itertools.islice(rest, 0 if place < len(word) - 1 else 1)]
        if one not in switches:
            return [word]  # click says what is wrong
        off.discard(str(switches[one].name))
        if equals and place == len(name) - 1:
            if _truth(one, value):
                return [name]
            off.add(str(switches[one].name))
            return [name[:-1]] if len(name) > 2 else []
    return [word]


def _truth(name: str, value: str) -> bool:
    from katapod.model.run_flags import parse_truth

    return parse_truth(name, value)


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
