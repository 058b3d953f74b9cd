"""`update`: other limits for a container."""

from __future__ import annotations

import json

from katapod.oci.errors import NOT_RUNNING, OciError
from katapod.oci.json_file import read_object
from katapod.oci.link import ask
from katapod.oci.records import Store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from katapod.oci.arguments import Call

__all__ = ["resources_of", "update"]

RESOURCES_MAX = 1 << 20  # bytes
NUMBERS = {
    "memory": ("memory", "limit"),
    "memory-reservation": ("memory", "reservation"),
    "memory-swap": ("memory", "swap"),
    "cpu-share": ("cpu", "shares"),
    "cpu-period": ("cpu", "period"),
    "cpu-quota": ("cpu", "quota"),
    "cpu-burst": ("cpu", "burst"),
    "cpu-rt-period": ("cpu", "realtimePeriod"),
    "cpu-rt-runtime": ("cpu", "realtimeRuntime"),
    "blkio-weight": ("blockIO", "weight"),
    "pids-limit": ("pids", "limit"),
}
TEXTS = {"cpuset-cpus": ("cpu", "cpus"), "cpuset-mems": ("cpu", "mems")}
OF_THE_HOST = ("l3-cache-schema", "mem-bw-schema", "kernel-memory", "kernel-memory-tcp", "cpu-idle")


def update(call: Call) -> int:
    record = Store(call.root).record(call.id)
    state = record.read()
    if state["status"] == "stopped":
        raise OciError(NOT_RUNNING)
    ask(record, state, {"do": "update", "resources": resources_of(call)})
    return 0


def resources_of(call: Call) -> str:
    """linux.resources as JSON: those of --resources, which count alone, or of the other options. Raises OciError."""
    path = call.values.get("resources", "")
    if path:
        try:
            return json.dumps(read_object(path, RESOURCES_MAX))
        except OSError as exc:
            raise OciError(f"cannot read the resources from {path}: {exc}") from exc
    found: dict[str, dict[str, Any]] = {}
    for name, value in call.values.items():
        if name in OF_THE_HOST:
            raise OciError(f"cannot set --{name}: a container's guest does not have it")
        if name in TEXTS:
            part, key = TEXTS[name]
            found.setdefault(part, {})[key] = value
        elif name in NUMBERS:
            part, key = NUMBERS[name]
            found.setdefault(part, {})[key] = _number(name, value)
    return json.dumps(found)


def _number(name: str, text: str) -> int:
    """Bytes may have a unit: 512m. Raises OciError."""
    units = {"k": 10, "m": 20, "g": 30, "t": 40} if name.startswith("memory") else {}
    digits, shift = text, 0
    if text[-1:].lower() in units:
        digits, shift = text[:-1], units[text[-1].lower()]
    if not digits.removeprefix("-").isdigit() or not digits.isascii() or len(digits) > 19:
        raise OciError(f"invalid value for --{name}: {text!r}")
    return int(digits) << shift
