"""One question to the management socket of a sandbox, and what may be wrong with its answer."""

from katapod.model.plain import plain
from katapod.rpc.http import HttpError, get_http

__all__ = ["ANSWER_MAX", "AnswerError", "ask"]

ANSWER_MAX = 2 << 20  # bytes


class AnswerError(Exception):
    """No answer, or none that is of use; the text says why.

    `refused`: nobody listens there; `unknown`: it knows no such path.
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
        raise AnswerError("nobody answers on its management socket", refused=True) from exc
    except BlockingIOError as exc:
        raise AnswerError("too many wait for its management socket already") from exc
    except OSError as exc:
        raise AnswerError(f"its management socket: {exc.strerror or exc}") from exc
    except HttpError as exc:
        raise AnswerError(
            plain(exc.text) or f"it answered with status {exc.status}", unknown=exc.status == 404
        ) from exc
