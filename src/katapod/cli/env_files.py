"""Files that a flag names: of environment variables, of labels."""

import os
from collections.abc import Iterable
from pathlib import Path

from katapod.model.errors import UsageError
from katapod.model.flags import parse_env_file

__all__ = ["env_files", "text_of"]


def env_files(paths: Iterable[str]) -> tuple[str, ...]:
    """The entries of --env-file. Raises UsageError."""
    found: list[str] = []
    for path in paths:
        found.extend(parse_env_file(text_of("--env-file", path), os.environ, path))
    return tuple(found)


def text_of(flag: str, path: str) -> str:
    """Raises UsageError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as exc:
        raise UsageError(f"cannot read {flag} {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        line = exc.object[: exc.start].count(b"\n") + 1
        raise UsageError(f"cannot read {flag} {path}: line {line} is not valid UTF-8") from exc
