"""A stack of releases that runs them all and keeps all their errors."""

import contextlib
import logging
from typing import Any

from katapod.tasks import finish

__all__ = ["ReleaseStack"]

log = logging.getLogger(__name__)


class ReleaseStack(contextlib.AsyncExitStack):
    """Runs every release even if one fails, and raises all their errors, not only the last."""

    def __init__(self) -> None:
        super().__init__()
        self._errors: list[Exception] = []

    def callback(self, callback: Any, /, *args: Any, **kwargs: Any) -> Any:
        def collect() -> None:
            try:
                callback(*args, **kwargs)
            except Exception as exc:
                self._errors.append(exc)

        return super().callback(collect)

    async def aclose(self) -> None:
        try:
            await super().aclose()
        except Exception as exc:
            self._errors.append(exc)
        if self._errors:
            errors, self._errors = self._errors, []
            raise ExceptionGroup("not all of the sandbox could be released", errors)

    async def unwind(self, sandbox_id: str) -> None:
        """aclose() after a failure, to its end whatever happens to the caller: what could not be released goes to
        the log, beside the first cause, which is what the caller raises."""
        try:
            await finish(self.aclose(), name="unwind")
        except ExceptionGroup as left:
            for error in left.exceptions:
                log.error("sandbox %s: %s", sandbox_id, error)
