"""Zeroing free memory before a guest is saved: whoever takes too much is ended by the kernel, and that is not init."""

from __future__ import annotations

import os
import signal

import pytest

from katapod.agent import template
from katapod.agent.loop import Loop
from katapod.agent.program import in_child


@pytest.fixture
def loop() -> Loop:
    return Loop()


def test_memory_is_taken_and_given_back(loop: Loop) -> None:
    try:
        assert loop.run(template.zero_chunks(loop, 2)) == 2 * template.CHUNK_BYTES
    finally:
        loop.close()


def test_who_takes_it_is_the_first_to_be_ended(loop: Loop) -> None:
    def look() -> str:
        template.take(0)
        with open("/proc/self/oom_score_adj") as handle:
            return handle.read()

    try:
        assert loop.run(in_child(loop, look, 60.0)) == "1000\n"
    finally:
        loop.close()
    with open("/proc/self/oom_score_adj") as handle:
        assert handle.read() != "1000\n"


def test_the_end_of_who_takes_it_is_no_failure(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "take", lambda chunks: os.kill(os.getpid(), signal.SIGKILL))
    try:
        assert loop.run(template.zero_chunks(loop, 2)) == 0
    finally:
        loop.close()
