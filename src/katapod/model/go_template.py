"""Templates of --format, in the part of Go's text/template that users of docker and podman write. Pure.

    {{.State.Status}}  {{json .}}  {{range $key, $value := .Labels}}..{{end}}  {{if and .A (eq .B 1)}}..{{end}}

Values are those of JSON. What a template names and a value has not is an error, with what there is. Source:
pkg.go.dev/text/template, and the functions that Docker adds (docs.docker.com/engine/cli/formatting).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from katapod.model.errors import UsageError

__all__ = ["Template", "parse_template"]

FLAG = "--format"
LENGTH_MAX = 64 << 10
DEPTH_MAX = 50
_ACTION = re.compile(r"\{\{(- )?(.*?)( -)?\}\}", re.DOTALL)
_TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:\\.|[^"\\])*"|`[^`]*`)|(?P<number>-?[0-9]+(?:\.[0-9]+)?)|(?P<field>(?:\.[A-Za-z_]\w*)+|\.)"""
    r"""|(?P<variable>\$\w*)(?P<path>(?:\.[A-Za-z_]\w*)*)|(?P<word>[A-Za-z_]\w*)|(?P<mark>:=|[|(),]))""",
    re.ASCII,
)


class _Missing(Exception):
    """A name that a value has not."""


class _Scope(Struct, frozen=True):
    dot: Any
    variables: dict[str, Any]


_Expression = Callable[[_Scope], Any]
_Node = Callable[[_Scope], str]


class Template(Struct, frozen=True):
    """`table`: it began with the word, so that its lines are rows below a head of the names that it has."""

    text: str
    nodes: tuple[_Node, ...]
    table: bool
    fields: tuple[str, ...]

    def render(self, value: Any) -> str:
        """Raises UsageError where the value has not what the template names."""
        try:
            return _render(self.nodes, _Scope(value, {"$": value}))
        except (_Missing, TypeError, ValueError, IndexError, KeyError, RecursionError) as exc:
            raise UsageError(f"cannot use {FLAG} {self.text[:200]!r}: {exc}") from exc


def parse_template(text: str) -> Template:
    r"""Parse what follows --format. Written \t and \n are a tab and a line's end. Raises UsageError."""
    if len(text) > LENGTH_MAX:
        raise UsageError(f"cannot use {FLAG}: it has {len(text)} characters, at most {LENGTH_MAX} are allowed")
    table = text.startswith("table")
    body = (text.removeprefix("table").lstrip() if table else text).replace("\\t", "\t").replace("\\n", "\n")
    try:
        parser = _Parser(_pieces(body))
        nodes = parser.block(0)
        if parser.left():
            raise ValueError(f"unexpected {parser.left()!r}")
    except (ValueError, RecursionError) as exc:
        raise UsageError(
            f"cannot use {FLAG} {text[:200]!r}: {exc}",
            hint=f"for example: {FLAG} '{{{{.Name}}}}', {FLAG} '{{{{json .}}}}'",
        ) from exc
    return Template(text, nodes, table, tuple(dict.fromkeys(re.findall(r"\.([A-Za-z]\w*)", "".join(parser.actions)))))


def _pieces(text: str) -> list[tuple[str, str]]:
    """("text" or "action", content) in turn; marks beside the braces take white space away."""
    found, place, trim = list[tuple[str, str]](), 0, False
    for match in _ACTION.finditer(text):
        before = text[place : match.start()]
        before = before.lstrip() if trim else before
        found.append(("text", before.rstrip() if match[1] else before))
        content = match[2].strip()
        if not content.startswith("/*"):
            found.append(("action", content))
        place, trim = match.end(), bool(match[3])
    rest = text[place:].lstrip() if trim else text[place:]
    if "{{" in rest:
        raise ValueError("a '{{' has no '}}'")
    return [*found, ("text", rest)]


class _Parser:
    def __init__(self, pieces: list[tuple[str, str]]) -> None:
        self._pieces = pieces
        self._place = 0
        self.actions = [content for kind, content in pieces if kind == "action"]

    def left(self) -> str:
        return self._pieces[self._place][1] if self._place < len(self._pieces) else ""

    def block(self, depth: int) -> tuple[_Node, ...]:
        """Up to an action that ends it: end or else, which is left."""
        if depth > DEPTH_MAX:
            raise ValueError("it is nested too deep")
        nodes = list[_Node]()
        while self._place < len(self._pieces):
            kind, content = self._pieces[self._place]
            if kind == "text":
                self._place += 1
                nodes.append(_constant(content))
                continue
            word = content.split(" ", 1)[0]
            if word in ("end", "else"):
                break
            self._place += 1
            if word in ("if", "with", "range"):
                nodes.append(self._compound(word, content[len(word) :], depth))
            else:
                nodes.append(_output(content))
        return tuple(nodes)

    def _compound(self, word: str, condition: str, depth: int) -> _Node:
        names, expression = _assigned(condition)
        body = self.block(depth + 1)
        other: tuple[_Node, ...] = ()
        ending = self._next_action(word)
        if ending.startswith("else "):
            other = (self._compound("if", ending.removeprefix("else ").strip().removeprefix("if"), depth + 1),)
        elif ending == "else":
            other = self.block(depth + 1)
            if self._next_action(word) != "end":
                raise ValueError(f"the {word} has more than one else")
        if word == "range":
            return _range(names, expression, body, other)
        return _condition(names, expression, body, other, with_dot=word == "with")

    def _next_action(self, word: str) -> str:
        if self._place >= len(self._pieces):
            raise ValueError(f"the {word} has no end")
        content = self._pieces[self._place][1]
        self._place += 1
        return content


def _render(nodes: Sequence[_Node], scope: _Scope) -> str:
    return "".join(node(scope) for node in nodes)


def _constant(text: str) -> _Node:
    return lambda scope: text


def _output(content: str) -> _Node:
    names, expression = _assigned(content)
    if not names:
        return lambda scope: _shown(expression(scope))

    def assign(scope: _Scope) -> str:
        scope.variables[names[0]] = expression(scope)
        return ""

    return assign


def _condition(
    names: list[str], expression: _Expression, body: tuple[_Node, ...], other: tuple[_Node, ...], *, with_dot: bool
) -> _Node:
    def node(scope: _Scope) -> str:
        value = expression(scope)
        variables = scope.variables | dict.fromkeys(names, value)
        if not _truth(value):
            return _render(other, scope)
        return _render(body, _Scope(value if with_dot else scope.dot, variables))

    return node


def _range(names: list[str], expression: _Expression, body: tuple[_Node, ...], other: tuple[_Node, ...]) -> _Node:
    def node(scope: _Scope) -> str:
        value = expression(scope)
        if value is not None and not isinstance(value, list | tuple | dict):
            raise _Missing(f"range cannot go over {_shown(value)!r}")
        items = list(sorted(value.items()) if isinstance(value, dict) else enumerate(value or ()))
        if not items:
            return _render(other, scope)
        return "".join(
            _render(body, _Scope(item, scope.variables | dict(zip(names[::-1], (item, key), strict=False))))
            for key, item in items
        )

    return node


def _assigned(text: str) -> tuple[list[str], _Expression]:
    """$A := PIPELINE, $A, $B := PIPELINE, or a pipeline alone."""
    tokens = _tokens(text)
    names = list[str]()
    if ("mark", ":=") in tokens:
        place = tokens.index(("mark", ":="))
        names = [value for kind, value in tokens[:place] if kind == "variable"]
        tokens = tokens[place + 1 :]
    expression, rest = _pipeline(tokens)
    if rest:
        raise ValueError(f"unexpected {rest[0][1]!r} in {text.strip()!r}")
    return names, expression


def _tokens(text: str) -> list[tuple[str, str]]:
    found, place = list[tuple[str, str]](), 0
    text = text.rstrip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ValueError(f"cannot read {text[place:].strip()[:40]!r}")
        kind = str(match.lastgroup if match.lastgroup != "path" else "variable")
        found.append((kind, match.group().strip()))
        place = match.end()
    return found


_Tokens = list[tuple[str, str]]


def _pipeline(tokens: _Tokens) -> tuple[_Expression, _Tokens]:
    """COMMAND | COMMAND: the former's value is the last argument of the next."""
    expression, rest = _command(tokens, None)
    while rest and rest[0] == ("mark", "|"):
        expression, rest = _command(rest[1:], expression)
    return expression, rest


def _command(tokens: _Tokens, last: _Expression | None) -> tuple[_Expression, _Tokens]:
    if not tokens:
        raise ValueError("a value is missing")
    kind, word = tokens[0]
    if kind != "word" or word in ("true", "false", "nil"):
        if last is not None:
            raise ValueError(f"{word!r} is no function, and cannot follow '|'")
        return _operand(tokens)
    if word not in FUNCTIONS:
        raise ValueError(f"there is no function {word!r}; known are {', '.join(sorted(FUNCTIONS))}")
    arguments, rest = list[_Expression](), tokens[1:]
    while rest and rest[0] not in (("mark", "|"), ("mark", ")"), ("mark", ",")):
        argument, rest = _operand(rest)
        arguments.append(argument)
    every = (*arguments, *((last,) if last is not None else ()))
    function = FUNCTIONS[word]

    def call(scope: _Scope) -> Any:
        return function(*(each(scope) for each in every))

    return call, rest


def _operand(tokens: _Tokens) -> tuple[_Expression, _Tokens]:
    (kind, word), rest = tokens[0], tokens[1:]
    if (kind, word) == ("mark", "("):
        inner, rest = _pipeline(rest)
        if not rest or rest[0] != ("mark", ")"):
            raise ValueError("a '(' has no ')'")
        rest = rest[1:]
        if rest and rest[0][0] == "field" and rest[0][1] != ".":
            steps = [name for name in rest[0][1].split(".") if name]
            return lambda scope: _follow(inner(scope), steps), rest[1:]
        return inner, rest
    if kind == "text":
        text = word[1:-1] if word[0] == "`" else json.loads(word)
        return lambda scope: text, rest
    if kind == "number":
        number = float(word) if "." in word else int(word)
        return lambda scope: number, rest
    if kind == "field":
        path = [name for name in word.split(".") if name]
        return lambda scope: _follow(scope.dot, path), rest
    if kind == "variable":
        name, *steps = word.split(".")
        return lambda scope: _follow(_variable(scope, name), steps), rest
    if kind == "word" and word in ("true", "false", "nil"):
        constant = {"true": True, "false": False, "nil": None}[word]
        return lambda scope: constant, rest
    if kind == "word":  # a function without arguments
        return _command(tokens[:1], None)[0], rest
    raise ValueError(f"unexpected {word!r}")


def _variable(scope: _Scope, name: str) -> Any:
    if name not in scope.variables:
        raise _Missing(f"there is no variable {name}")
    return scope.variables[name]


def _follow(value: Any, path: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(value, Mapping) or name not in value:
            known = ", ".join(sorted(f".{key}" for key in value)) if isinstance(value, Mapping) else "nothing below it"
            raise _Missing(f"there is no .{name}; there is {known}")
        value = value[name]
    return value


def _truth(value: Any) -> bool:
    return bool(value)


def _shown(value: Any) -> str:
    """As Go prints it with %v."""
    if value is None:
        return "<no value>"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"map[{' '.join(f'{key}:{_shown(item)}' for key, item in sorted(value.items()))}]"
    if isinstance(value, list | tuple):
        return f"[{' '.join(_shown(item) for item in value)}]"
    return str(value)


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(value, Mapping):
            value = value.get(str(key), "")  # Go's zero value
        elif isinstance(value, list | tuple) and isinstance(key, int) and 0 <= key < len(value):
            value = value[key]
        else:
            raise _Missing(f"index {key!r} is not in {_shown(value)[:80]!r}")
    return value


def _slice(value: Any, start: int = 0, end: int | None = None) -> Any:
    return value[start:end]


def _printf(form: str, *values: Any) -> str:
    rest = iter(values)

    def one(found: re.Match[str]) -> str:
        if found[0] == "%%":
            return "%"
        value = next(rest, None)
        kind = found[2]
        if kind == "q":
            return json.dumps(_shown(value))
        if kind in "df" and isinstance(value, int | float):
            return f"%{found[1]}{kind}" % value
        return f"%{found[1]}s" % _shown(value)

    return re.sub(r"%(-?[0-9]{0,4}(?:\.[0-9]{1,3})?)([svdfqt])|%%", one, form)


def _both(*values: Any) -> Any:
    return next((value for value in values if not _truth(value)), values[-1])


def _either(*values: Any) -> Any:
    return next((value for value in values if _truth(value)), values[-1])


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "json": lambda value: json.dumps(value, separators=(",", ":")),
    "index": _index,
    "slice": _slice,
    "len": len,
    "join": lambda value, mark="": str(mark).join(_shown(item) for item in value or ()),
    "split": lambda value, mark: str(value).split(mark),
    "upper": lambda value: _shown(value).upper(),
    "lower": lambda value: _shown(value).lower(),
    "title": lambda value: _shown(value).title(),
    "pad": lambda value, before, after: f"{' ' * before}{value}{' ' * after}",
    "truncate": lambda value, size: _shown(value)[:size],
    "print": lambda *values: " ".join(_shown(value) for value in values),
    "println": lambda *values: " ".join(_shown(value) for value in values) + "\n",
    "printf": _printf,
    "eq": lambda one, *others: any(one == other for other in others),
    "ne": lambda one, other: one != other,
    "lt": lambda one, other: one < other,
    "le": lambda one, other: one <= other,
    "gt": lambda one, other: one > other,
    "ge": lambda one, other: one >= other,
    "and": _both,
    "or": _either,
    "not": lambda value: not _truth(value),
}
