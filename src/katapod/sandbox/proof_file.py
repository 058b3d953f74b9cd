"""The choices of accelerators that are kept, and the right to find out a new one.

The file is read by whoever starts a sandbox and written under a lock, so that starts at the same time find out once.
Times are of CLOCK_BOOTTIME: choices hold for this boot of the host, and nobody sets that clock.
"""

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec

from katapod.host.state import write_atomically
from katapod.model.errors import KatapodError
from katapod.vmm.judge import Finding
from katapod.vmm.proof import AcceleratorChoice, ProofPlan
from katapod.vmm.spec import Accelerator, CpuRemedy

__all__ = ["KeptChoice", "ProofFile", "now"]

POLL_S = 0.05
FIRST_RETRY_S = 600.0  # after a boot that timed out; doubled each time that it does so again
LAST_RETRY_S = 4 * 3600.0
TOLD_MAX = 50
KEPT_MAX = 200  # choices: annotations of pods may ask for many machines


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class KeptChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One answer. `tried` and `said` are for people: each boot in words, and what the VMM said."""

    accelerator: Accelerator
    reason: str
    at: float
    scope: str = ""
    advice: str = ""
    said: str = ""
    cpu_features: str = ""
    cpu_model: str = ""
    hangs: int = 0  # how many times in a row it timed out; 0: this is for good
    again_at: float = 0.0  # when a boot that timed out is tried again

    def is_due(self) -> bool:
        """Whether it is time to ask again."""
        return self.hangs > 0 and now() >= self.again_at

    def choice(self, key: str) -> AcceleratorChoice:
        return AcceleratorChoice(
            self.accelerator,
            self.reason,
            fresh=False,
            remedy=CpuRemedy(self.cpu_features, self.cpu_model),
            advice=self.advice,
            said=self.said,
            key=key,
            age_s=max(0.0, now() - self.at),
        )


class _Content(msgspec.Struct, forbid_unknown_fields=True):
    """All of the file. Only choices of this boot are kept."""

    boot_id: str
    choices: dict[str, KeptChoice]
    told: tuple[str, ...] = ()  # to people: why what was asked for keeps a sandbox from a better rung


class ProofFile:
    def __init__(self, path: Path, boot_id: str) -> None:
        self.path = path
        self._boot_id = boot_id

    def find(self, plan: ProofPlan) -> KeptChoice | None:
        """The answer that is kept for the plan; else that of another on whose guests this host hangs."""
        choices = self._read().choices
        if plan.key in choices:
            return choices[plan.key]
        alike = [kept for kept in choices.values() if kept.scope == plan.scope and kept.hangs]
        return max(alike, key=lambda kept: kept.again_at, default=None)

    def hangs_before(self, plan: ProofPlan) -> int:
        """How many times in a row guests like this one have timed out."""
        kept = self.find(plan)
        return kept.hangs if kept is not None else 0

    def keep(self, plan: ProofPlan, choice: AcceleratorChoice, finding: Finding | None) -> None:
        """Write an answer down, as far as it may be: a shortage is none, and a time-out does not take the place of a
        success. `finding`: why the plan's accelerator is not used, None where it is, or where there is
        none. The caller has the turn.

        Without the file, the next start finds out again. Raises nothing.
        """
        if finding is Finding.PASSING:
            return
        hangs = self.hangs_before(plan) + 1 if finding is Finding.HANGS else 0
        with self._changing() as content:
            choices = content.choices
            before = choices.get(plan.key)
            if hangs and before is not None and before.accelerator is plan.vm.accelerator:
                return
            choices.pop(plan.key, None)  # the newest last
            choices[plan.key] = KeptChoice(
                accelerator=choice.accelerator,
                reason=choice.reason,
                at=now(),
                scope=plan.scope,
                advice=choice.advice,
                said=choice.said,
                cpu_features=choice.remedy.features,
                cpu_model=choice.remedy.model,
                hangs=hangs,
                again_at=now() + retry_s(hangs) if hangs else 0.0,
            )
            for key in list(choices)[:-KEPT_MAX]:
                del choices[key]

    def drop(self, key: str) -> bool:
        """Forget an answer that turned out wrong; returns whether there was one. Raises nothing."""
        with self._changing() as content:
            dropped = content.choices.pop(key, None)
        return dropped is not None

    def tell_once(self, text: str) -> bool:
        """Whether this has not been told to anybody since the host booted; from now on it has. Where that cannot be
        written down it is told each time. Raises nothing."""
        if text in self._read().told:
            return False
        with self._changing() as content:
            content.told = (*content.told, text)[-TOLD_MAX:]
        return True

    @contextlib.asynccontextmanager
    async def turn(self, limit_s: float) -> AsyncIterator[bool]:
        """Be the only one on this host who finds out while the block runs; waits for another who does.

        Yields False where the other does not get done within the limit. The lock ends with its process. Where there
        can be no lock file nothing can be kept either, and everybody finds out alone.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            yield True
            return
        try:
            yield await _take(fd, limit_s)
        finally:
            os.close(fd)

    def _read(self) -> _Content:
        try:
            content = msgspec.json.decode(self.path.read_bytes(), type=_Content)
        except (OSError, msgspec.DecodeError):
            return _Content(self._boot_id, {})
        return content if content.boot_id == self._boot_id else _Content(self._boot_id, {})

    @contextlib.contextmanager
    def _changing(self) -> Iterator[_Content]:
        """The content, to be changed in the block and written at its end. A lock of its own, held for a moment: who
        drops a choice need not wait for a boot. What cannot be written is not kept."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, directory)
                fcntl.flock(directory, fcntl.LOCK_EX)
            content = self._read()
            before = msgspec.json.encode(content)
            yield content
            if (after := msgspec.json.encode(content)) != before:
                with contextlib.suppress(OSError, KatapodError):
                    write_atomically(self.path, msgspec.json.format(after, indent=1))


def retry_s(hangs: int) -> float:
    """How long to leave an accelerator alone after it has timed out so many times in a row."""
    return float(min(FIRST_RETRY_S * 2 ** min(hangs - 1, 30), LAST_RETRY_S))


async def _take(fd: int, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(POLL_S)  # a thread that waits in flock(2) could not be cancelled
