"""One request to the management socket of a sandbox, and the errors that can come of it."""

from katapod.model.plain import plain
from katapod.rpc.http import HttpError, get_http

__all__ = ["ANSWER_MAX", "AnswerError", "ask"]

ANSWER_MAX = 2 << 20  # bytes


class AnswerError(Exception):
    """No response, or an unusable one; the text says why.

    `refused`: nothing listens there; `unknown`: the server has no such path.
    """

    def __init__(self, text: str, *, refused: bool = False, unknown: bool = False) -> None:
        super().__init__(text)
        self.refused = refused
        self.unknown = unknown


async def ask(path: str, target: str, limit_s: float) -> bytes:
    """The body of GET `target`. Raises AnswerError, TimeoutError."""
    try:
        return await get_http(path, target, limit_s=limit_s, body_max=ANSWER_MAX)
    except TimeoutError:
        raise
    except (FileNotFoundError, ConnectionRefusedError) as exc:
        raise AnswerError("nothing listens on its management socket", refused=True) from exc
    except BlockingIOError as exc:
        raise AnswerError("too many clients are waiting for its management socket") from exc
    except OSError as exc:
        raise AnswerError(f"its management socket: {exc.strerror or exc}") from exc
    except HttpError as exc:
        raise AnswerError(
            plain(exc.text) or f"it responded with status {exc.status}", unknown=exc.status == 404
        ) from exc
