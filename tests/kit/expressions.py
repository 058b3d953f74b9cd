"""Whether a regular expression can be made to take more than linear time, by its structure.

A matcher that backtracks is slow where one place of a text can be matched in more than one way. So an expression is
called certain if that is nowhere possible: what may come next after each turn of an unbounded repeat never begins with
a character that the repeat could take as well, or the repeat is possessive. Then no text takes longer than its length,
times a constant, at each place where a match is tried. It is conservative: some harmless ones are not certain.
"""

import re
from collections.abc import Iterator, Sequence
from re import _constants as c  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

__all__ = ["ambiguities", "is_searchable"]

OTHER = 256  # any character beyond Latin-1
ALL = frozenset(range(OTHER + 1))
FEW = 64  # repeats up to so many count as a constant
ENDED = -1  # what may come next is the end of the text


def ambiguities(pattern: re.Pattern[str]) -> list[str]:
    """What is ambiguous, in words; empty if the expression is certain."""
    found: list[str] = []
    fold = bool(pattern.flags & re.IGNORECASE)
    _walk(list(_parser.parse(pattern.pattern, pattern.flags)), frozenset({ENDED}), fold, found)
    return found


def is_searchable(pattern: re.Pattern[str]) -> bool:
    """Whether a search is linear as well, though it tries at each place.

    A try is short, or begins at a line's or word's beginning, or with what no unbounded repeat of the expression takes:
    then the next try begins after what this one has looked at.
    """
    items = list(_parser.parse(pattern.pattern, pattern.flags))
    fold = bool(pattern.flags & re.IGNORECASE)
    if _parser.parse(pattern.pattern, pattern.flags).getwidth()[1] <= 4 * FEW:
        return True
    if items[0][0] in (c.AT, c.ASSERT_NOT):
        return True
    return not _first(items, fold, frozenset({ENDED})) & _repeated(items, fold)


def _repeated(items: Sequence[Any], fold: bool) -> frozenset[int]:
    """What the unbounded repeats begin with."""
    found: frozenset[int] = frozenset()
    for op, value in items:
        for body, repeats in _bodies(op, value):
            found |= _repeated(body, fold) | (_first(body, fold, frozenset()) if repeats else frozenset())
    return found


def _walk(items: Sequence[Any], after: frozenset[int], fold: bool, found: list[str]) -> None:
    """`after`: what may come after the items."""
    for index, (op, value) in enumerate(items):
        following = _first(items[index + 1 :], fold, after)
        for body, repeats in _bodies(op, value):
            come = following | (_first(body, fold, frozenset()) if repeats else frozenset())
            if op is c.MAX_REPEAT or op is c.MIN_REPEAT:
                clash = _first(body, fold, frozenset()) & following
                if repeats and clash:
                    shown = "".join(chr(code) if 32 <= code < 127 else "?" for code in sorted(clash))[:20]
                    found.append(f"a repeat and what follows it both take one of {shown!r}")
            _walk(body, come, fold, found)
        # alternatives that begin alike cost a constant each, unless a repeat holds them
        if op in (c.MAX_REPEAT, c.MIN_REPEAT) and value[1] > FEW:
            _check_branches(list(value[2]), fold, found)


def _bodies(op: Any, value: Any) -> Iterator[tuple[Sequence[Any], bool]]:
    """The parts inside an item, and whether they are repeated without a bound."""
    if op in (c.MAX_REPEAT, c.MIN_REPEAT, c.POSSESSIVE_REPEAT):
        yield list(value[2]), value[1] > FEW
    elif op is c.SUBPATTERN:
        yield list(value[3]), False
    elif op is c.BRANCH:
        for each in value[1]:
            yield list(each), False
    elif op in (c.ASSERT, c.ASSERT_NOT):
        yield list(value[1]), False
    elif op is c.ATOMIC_GROUP:
        yield list(value), False


def _check_branches(items: Sequence[Any], fold: bool, found: list[str]) -> None:
    for op, value in items:
        if op is c.BRANCH:
            seen: frozenset[int] = frozenset()
            for each in value[1]:
                first = _first(list(each), fold, frozenset())
                if first & seen:
                    found.append("alternatives inside a repeat begin alike")
                seen |= first
        for body, _ in _bodies(op, value):
            _check_branches(body, fold, found)


def _first(items: Sequence[Any], fold: bool, after: frozenset[int]) -> frozenset[int]:
    """The characters that a match of the items, and of what comes after them, may begin with."""
    found: frozenset[int] = frozenset()
    for op, value in items:
        chars, may_be_empty = _first_of(op, value, fold)
        found |= chars
        if not may_be_empty:
            return found
    return found | after


def _first_of(op: Any, value: Any, fold: bool) -> tuple[frozenset[int], bool]:
    if op in (c.LITERAL, c.NOT_LITERAL, c.IN, c.ANY):
        return _chars(op, value, fold), False
    if op in (c.MAX_REPEAT, c.MIN_REPEAT, c.POSSESSIVE_REPEAT):
        inner = _first(list(value[2]), fold, frozenset({ENDED}))
        return inner - {ENDED}, value[0] == 0 or ENDED in inner
    if op in (c.AT, c.ASSERT, c.ASSERT_NOT):
        return frozenset(), True
    if op is c.GROUPREF:
        return ALL, True
    parts = [_first(body, fold, frozenset({ENDED})) for body, _ in _bodies(op, value)]
    union = frozenset().union(*parts)
    return union - {ENDED}, ENDED in union


def _chars(op: Any, value: Any, fold: bool) -> frozenset[int]:
    if op is c.ANY:
        return ALL
    if op is c.NOT_LITERAL:
        return ALL - {value}
    if op is c.LITERAL:
        return _folded({min(value, OTHER)}, fold)
    chosen: set[int] = set()
    negated = False
    for kind, what in value:
        if kind is c.NEGATE:
            negated = True
        elif kind is c.LITERAL:
            chosen.add(min(what, OTHER))
        elif kind is c.RANGE:
            chosen |= {min(code, OTHER) for code in range(what[0], min(what[1], OTHER) + 1)}
        else:
            chosen |= _category(what, inside=not negated)
    chosen = set(_folded(chosen, fold))
    return ALL - chosen if negated else frozenset(chosen)


def _category(what: Any, *, inside: bool) -> set[int]:
    """The larger guess where it is not known what it holds beyond Latin-1."""
    letter = {c.CATEGORY_DIGIT: "d", c.CATEGORY_WORD: "w", c.CATEGORY_SPACE: "s"}
    letter |= {c.CATEGORY_NOT_DIGIT: "D", c.CATEGORY_NOT_WORD: "W", c.CATEGORY_NOT_SPACE: "S"}
    found = {code for code in range(OTHER) if re.match(rf"\{letter[what]}", chr(code))}
    return found | {OTHER} if inside else found


def _folded(codes: set[int], fold: bool) -> frozenset[int]:
    if not fold:
        return frozenset(codes)
    both = {
        ord(each) for code in codes if code < OTHER for each in (chr(code).lower(), chr(code).upper()) if len(each) == 1
    }
    return frozenset({min(code, OTHER) for code in both} | codes)
