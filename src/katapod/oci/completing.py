"""What the Tab key offers in the command line of OCI runtimes: verbs, options and the names of containers."""

from __future__ import annotations

from katapod.oci.arguments import SYNTAX, Syntax
from katapod.oci.summaries import SUMMARIES
from katapod.oci.words import GLOBAL_SWITCHES, GLOBAL_VALUES, default_root, speaks_oci

__all__ = ["complete_oci"]


def complete_oci(words: list[str], begun: str) -> list[tuple[str, str]] | None:
    """Word and description of all that may come after `words` and begins with `begun`; nothing where files may come.
    None: these are not the words of an OCI engine."""
    if not speaks_oci(words):
        return None
    root, rest = _after_globals(words)
    if rest is None:
        return []
    if not rest:
        found = [*SUMMARIES.items(), *((name, "") for name in (*GLOBAL_VALUES, *GLOBAL_SWITCHES) if begun)]
    else:
        syntax = SYNTAX.get(rest[0])
        found = [] if syntax is None else _of_verb(syntax, rest[1:], root, begun)
    return [(word, about) for word, about in found if word.startswith(begun)]


def _after_globals(words: list[str]) -> tuple[str, list[str] | None]:
    """The state directory, and the verb with what follows; None where an option's value is to come."""
    root = default_root()
    rest = list(words)
    while rest and rest[0].startswith("-"):
        name, equals, value = rest.pop(0).partition("=")
        if name in GLOBAL_VALUES and not equals:
            if not rest:
                return root, None
            value = rest.pop(0)
        if name == "--root":
            root = value
    return root, rest


def _of_verb(syntax: Syntax, given: list[str], root: str, begun: str) -> list[tuple[str, str]]:
    """Options, or the containers if the first operand is to come."""
    valued = {**syntax.values, **syntax.lists}
    words = iter(given)
    operands = 0
    for word in words:
        if word in valued:
            if next(words, None) is None:
                return []
        elif not word.startswith("-"):
            operands += 1
    if begun.startswith("-"):
        names = (*valued, *syntax.switches, "--help")
        return [(name, "") for name in names if name.startswith("--")]
    if operands or not syntax.least:
        return []
    from katapod.oci.records import Store

    return [(record.id, "") for record in Store(root).records()]
