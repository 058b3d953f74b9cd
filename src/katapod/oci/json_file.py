"""Objects in JSON files that an engine names."""

from __future__ import annotations

import json

from katapod.oci.errors import OciError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["read_object"]


def read_object(path: str, bytes_max: int) -> dict[str, Any]:
    """ "-" stands for the standard input. Raises OSError; OciError if it is larger, or no object."""
    stdin = path == "-"
    with open(0 if stdin else path, "rb", closefd=not stdin) as handle:
        data = handle.read(bytes_max + 1)
    if len(data) > bytes_max:
        raise OciError(f"cannot read {path}: it has more than {bytes_max} bytes")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise OciError(f"cannot read {path}: it is not JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise OciError(f"cannot read {path}: it is not an object")
    return found
