"""Which QEMU this is, and whether its emulation may give each virtual CPU a thread of its own.

Before 8.1 it may not. A thread that translates code does not lock the page it reads: if another virtual CPU writes
there meanwhile, what was translated is kept although it is outdated. Linux patches its code now and then (static
keys, by an int3 that stands there for a moment); a guest with several virtual CPUs then traps for ever at an int3
that is there no more, or falls down over it. Source: QEMU's commit deba78709ae8 ("accel/tcg: Always lock pages before
translation"), which no release of 7.2 has.
"""

import logging
import re

from msgspec import structs

from katapod.host.facts import version_words
from katapod.model.errors import KatapodError
from katapod.vmm.qemu.command_line import QemuOption, QemuPlan

__all__ = ["on_one_thread", "parse_release", "with_sound_threads"]

log = logging.getLogger(__name__)

SOUND_SINCE = (8, 1)


async def with_sound_threads(plan: QemuPlan, program: str) -> QemuPlan:
    """The plan, changed if this QEMU would run several virtual CPUs at a time and cannot."""
    if plan.emulated_cpus < 2 or await _release_of(program) >= SOUND_SINCE:
        return plan
    return on_one_thread(plan)


def on_one_thread(plan: QemuPlan) -> QemuPlan:
    """The virtual CPUs take turns on one thread of the host."""
    options = tuple(
        QemuOption(option.switch, f"{option.value},thread=single") if option.switch == "-accel" else option
        for option in plan.options
    )
    return structs.replace(plan, options=options)


async def _release_of(program: str) -> tuple[int, int]:
    """(0, 0) if it does not say."""
    try:
        return parse_release(await version_words(program))
    except KatapodError as exc:
        log.debug("%s does not tell its version: %s", program, exc)
        return (0, 0)


def parse_release(text: str) -> tuple[int, int]:
    """From what --version prints; (0, 0) if it is not in there."""
    found = re.search(r"\bversion (\d{1,4})\.(\d{1,4})\b", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
