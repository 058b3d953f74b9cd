"""`state`, `list`, `ps`, `events`: what there is of containers."""

from __future__ import annotations

import json
import sys
import time

from katapod.oci.errors import NOT_RUNNING, OciError
from katapod.oci.link import ask
from katapod.oci.records import Record, State, Store
from katapod.version import OCI_VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from katapod.oci.arguments import Call

__all__ = ["events", "list_containers", "processes", "state"]

SHOWN = ("id", "pid", "status", "bundle", "rootfs", "created", "annotations", "owner")


def state(call: Call) -> int:
    print(json.dumps(_shown(Store(call.root).record(call.id).read()), indent=2))
    return 0


def _shown(found: State) -> State:
    return {"ociVersion": OCI_VERSION, **{key: found[key] for key in SHOWN}}


def list_containers(call: Call) -> int:
    found = [_shown(record.read()) for record in Store(call.root).records()]
    if "quiet" in call.switches:
        for each in found:
            print(each["id"])
    elif _format(call) == "json":
        print(json.dumps(found) if found else "null")
    else:
        columns = ("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER")
        _print_table(columns, ([str(each[name.lower()]) for name in columns] for each in found))
    return 0


def _format(call: Call) -> str:
    chosen = call.values.get("format", "table")
    if chosen not in ("table", "json"):
        raise OciError(f"invalid format option: {chosen!r}: use table or json")
    return chosen


def _print_table(columns: Iterable[str], rows: Iterable[list[str]]) -> None:
    lines = [list(columns), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("   ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())


def processes(call: Call) -> int:
    """json: the host's pids, which engines give to ps(1). table: those of the guest too, and what they run is known
    there alone."""
    answer = _ask(Store(call.root).record(call.id), {"do": "ps"})
    if _format(call) == "json":
        print(json.dumps(answer["pids"]))
    else:
        rows = [[str(proxy or answer["pids"][0]), str(pid)] for pid, proxy in answer["guest"]]
        _print_table(("PID", "PID IN VM"), rows)
    return 0


def events(call: Call) -> int:
    """Statistics at each interval until the container has stopped; with --stats once."""
    record = Store(call.root).record(call.id)
    interval_s = _seconds(call.values.get("interval", "5s"))
    while True:
        try:
            answer = _ask(record, {"do": "stats"})
        except OciError:
            if "stats" in call.switches or record.read()["status"] != "stopped":
                raise
            return 0
        print(json.dumps({"type": "stats", "id": record.id, "data": answer["data"]}))
        sys.stdout.flush()
        if "stats" in call.switches:
            return 0
        time.sleep(interval_s)


def _ask(record: Record, message: dict[str, Any]) -> dict[str, Any]:
    found = record.read()
    if found["status"] == "stopped":
        raise OciError(NOT_RUNNING)
    return ask(record, found, message)


def _seconds(text: str) -> float:
    """As Go writes durations, of one unit. Raises OciError."""
    for unit, factor in (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0)):
        number = text.removesuffix(unit)
        if number != text and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return float(number) * factor
    raise OciError(f"duration interval must be greater than 0, as in 5s: {text!r}")
