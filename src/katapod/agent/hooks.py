"""Programs of the guest image that each container's start and end run: guest_hook_path of the sandbox.

They are appended to the hooks of the OCI specification, which crun runs, in the order of their names.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.rpc.pb import oci_pb2

__all__ = ["KINDS", "add_hooks", "find_hooks"]

KINDS = ("prestart", "poststart", "poststop")  # directories, and lists of the specification


def find_hooks(directory: str) -> dict[str, list[str]]:
    """Kind to the executable files of its directory; a directory that is missing has none."""
    found: dict[str, list[str]] = {}
    for kind in KINDS:
        folder = f"{directory}/{kind}"
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        paths = [f"{folder}/{name}" for name in names]
        if programs := [path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)]:
            found[kind] = programs
    return found


def add_hooks(spec: oci_pb2.Spec, hooks: dict[str, list[str]]) -> None:
    for kind, programs in hooks.items():
        for path in programs:
            getattr(spec.Hooks, kind.capitalize()).add(Path=path, Args=[path])
