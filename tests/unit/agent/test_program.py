"""How the agent runs programs: with random addresses or fixed ones, which its own process never has."""

from __future__ import annotations

import pytest

from katapod.agent import program
from katapod.agent.loop import Loop

PERSONALITY = "/proc/self/personality"


def personality_of_a_program() -> str:
    loop = Loop()
    try:
        said: str = loop.run(program.run(loop, ["cat", PERSONALITY], 30.0))
        return said.strip()
    finally:
        loop.close()


def test_addresses_are_fixed_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_fixed", False)
    usual = personality_of_a_program()
    program.fix_addresses()
    assert int(personality_of_a_program(), 16) == int(usual, 16) | 0x0040000  # ADDR_NO_RANDOMIZE
    with open(PERSONALITY) as handle:
        assert handle.read().strip() == usual
