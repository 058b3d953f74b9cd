"""`kata-runtime check`: facts in, verdicts out. Pure.

A host is capable if no line is `missing`. With `strict` it has to have all: no `less`, and no `unknown`.
"""

from collections.abc import Iterable

from msgspec import Struct

from katapod.observe.check_facts import CheckFacts, Line, Outcome
from katapod.observe.check_machine import judge_machine
from katapod.observe.check_software import judge_software

__all__ = ["CAPABLE", "CREATES", "NOT_CAPABLE", "Report", "judge"]

CAPABLE = "System is capable of running Kata Containers"
CREATES = "System can currently create Kata Containers"
NOT_CAPABLE = "System is not capable of running Kata Containers"
"""Upstream's words: scripts look for them."""


class Report(Struct, frozen=True):
    lines: tuple[Line, ...]
    root: bool

    def count(self, outcome: Outcome) -> int:
        return sum(line.outcome is outcome for line in self.lines)

    @property
    def capable(self) -> bool:
        return not self.count(Outcome.MISSING)

    def passes(self, *, strict: bool) -> bool:
        return self.capable and not (strict and (self.count(Outcome.LESS) or self.count(Outcome.UNKNOWN)))

    def describe(self) -> str:
        return "\n".join(f"{line.outcome.value:8}{line.title}: {line.found}" for line in self.lines)


def judge(facts: CheckFacts) -> Report:
    return Report(_in_order((*judge_machine(facts), *judge_software(facts))), facts.root)


def _in_order(lines: Iterable[Line]) -> tuple[Line, ...]:
    lines = tuple(lines)
    assert len({line.line_id for line in lines}) == len(lines), "ids are what programs go by"
    return lines
