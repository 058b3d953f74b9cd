"""Guest hooks: programs of the guest image that run at each container's start and end (guest_hook_path).

They are appended to the hooks of the OCI spec, which crun runs, in alphabetical order.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.rpc.pb import oci_pb2

__all__ = ["KINDS", "add_hooks", "find_hooks"]

KINDS = ("prestart", "poststart", "poststop")  # names of directories, and of lists in the spec


def find_hooks(directory: str) -> dict[str, list[str]]:
    """The executable files of each directory, by kind; a missing directory has none."""
    found: dict[str, list[str]] = {}
    for kind in KINDS:
        of_kind = f"{directory}/{kind}"
        try:
            names = sorted(os.listdir(of_kind))
        except OSError:
            continue
        paths = [f"{of_kind}/{name}" for name in names]
        if programs := [path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)]:
            found[kind] = programs
    return found


def add_hooks(spec: oci_pb2.Spec, hooks: dict[str, list[str]]) -> None:
    for kind, programs in hooks.items():
        for path in programs:
            getattr(spec.Hooks, kind.capitalize()).add(Path=path, Args=[path])
