"""What a child that stays in the background tells the process that has started it, through a pipe: once it runs, or why
it does not."""

import contextlib
import json
import os

from katapod.model.errors import KatapodError
from katapod.sandbox.errors import CommandNotExecutable, CommandNotFound

__all__ = ["expect_started", "tell", "tell_error"]


def tell(writer: int, message: dict[str, object]) -> None:
    """By the child; a parent that has ended misses nothing."""
    with contextlib.suppress(OSError):
        os.write(writer, json.dumps(message).encode())


def tell_error(writer: int, exc: BaseException) -> None:
    hint = exc.hint if isinstance(exc, KatapodError) else ""
    code = exc.exit_code if isinstance(exc, KatapodError) else 125
    tell(writer, {"error": str(exc) or repr(exc), "hint": hint, "code": code})


def expect_started(report: bytes, pid: int, what: str) -> None:
    """`report`: all that the child `pid` has told. One that has not started is reaped, and its error raised: a
    KatapodError; `what` was to be done by it."""
    answer = json.loads(report) if report else {}
    if report and "error" not in answer:
        return
    os.waitpid(pid, 0)
    if not report:
        raise KatapodError(f"cannot {what}: the process in the background was killed")
    kind = {127: CommandNotFound, 126: CommandNotExecutable}.get(answer["code"], KatapodError)
    raise kind(answer["error"], hint=answer["hint"])
