"""The errors of this room.

KatapodError
|-- VmmFailed          the VMM did not start, or ended by itself
|-- VmmRefused         the VMM did not do what it was asked to
`-- VmmLinkBroken      the VMM cannot be asked any more: it has ended, hangs, or says what is not understood
"""

from katapod.model.errors import KatapodError

__all__ = ["VmmFailed", "VmmLinkBroken", "VmmRefused"]


class VmmFailed(KatapodError):
    """The context has its command line; `returncode` is its status if it has ended, negative for a signal."""

    def __init__(self, what: str, *, hint: str = "", returncode: int | None = None, **context: object) -> None:
        super().__init__(what, hint=hint, **context)
        self.returncode = returncode


class VmmRefused(KatapodError):
    """`kind` is the VMM's own name for the error, where it has one."""

    def __init__(self, what: str, *, hint: str = "", kind: str = "", **context: object) -> None:
        super().__init__(what, hint=hint, **context)
        self.kind = kind


class VmmLinkBroken(KatapodError):
    """The VMM cannot be asked any more. Its own end, if that is the cause, is seen a moment later."""
