"""A question before something is removed that was not named."""

import os

from katapod.model.errors import UsageError

__all__ = ["agreed"]


def agreed(question: str, force: bool) -> bool:
    """Whether the user says yes; `force` does without. Raises UsageError where there is nobody to ask."""
    if force:
        return True
    if not os.isatty(0):
        raise UsageError("cannot ask whether to remove them: standard input is not a terminal", hint="add --force")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
