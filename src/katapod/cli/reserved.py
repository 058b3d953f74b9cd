"""Programs whose names are taken and whose work is not there yet: they say so, and fail."""

import sys

__all__ = ["monitor_main", "shim_main"]


def _refuse(program: str, what: str) -> int:
    print(f"{program}: cannot {what}: this version of Katapod does not do it yet", file=sys.stderr)
    print("  hint: kata-runtime run works today", file=sys.stderr)
    return 1


def shim_main() -> int:
    return _refuse("containerd-shim-kata-v2", "serve containerd or CRI-O")


def monitor_main() -> int:
    return _refuse("kata-monitor", "collect metrics")
