"""`events`: what happens to containers."""

import contextlib
import sys
import time
from datetime import datetime
from typing import Any

import click

from katapod.cli.command import option, repeatable, verb
from katapod.cli.formats import print_each, the_format
from katapod.cli.settings import Globals, need_root
from katapod.host.event_log import Event, read_events
from katapod.model.flags import refuse
from katapod.model.plain import plain

__all__ = ["events"]

FILTERS = ("container", "event", "image", "label", "type")


@verb("events")
@option("--since", metavar="TIME", help="Also those from this time on: 2026-11-23T19:50:12Z, 10m, or seconds.")
@option("--until", metavar="TIME", help="End at this time; default: go on until Ctrl-C.")
@repeatable("-f", "--filter", "wanted", metavar="K=V", help="Only those: container, event, image, label, type.")
@the_format
@click.pass_obj
def events(settings: Globals, /, since: str, until: str, wanted: tuple[str, ...], form: str) -> None:
    """Print what happens to containers of run and create, as it happens: create, start, pause, unpause, kill, oom, die,
    stop, restart and destroy, in docker's words.

    About a MiB of the newest is kept until this host ends. With an operand this is the command of OCI runtimes.
    """
    need_root("events")
    now = time.time()
    begin_ns = _moment_ns(since, now, "--since") if since else int(now * 1e9)
    end_ns = _moment_ns(until, now, "--until") if until else None
    filters = _filters(wanted)
    with contextlib.suppress(KeyboardInterrupt):
        for event in read_events(settings.layout, follow_until=end_ns / 1e9 if end_ns is not None else None):
            if event is None:
                sys.stdout.flush()
            elif begin_ns <= event.time_ns and (end_ns is None or event.time_ns < end_ns) and _matches(event, filters):
                _print(event, form)


def _moment_ns(text: str, now: float, flag: str) -> int:
    from katapod.model.log_flags import parse_time

    stamp = parse_time(text, now, flag).decode()
    whole, _, below = stamp.removesuffix("Z").partition(".")
    return int(datetime.fromisoformat(f"{whole}+00:00").timestamp()) * 10**9 + int(below)


def _filters(wanted: tuple[str, ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in wanted:
        key, equals, value = text.partition("=")
        if not equals or key not in FILTERS:
            refuse("--filter", text, f"it is not KEY=VALUE with a key of {', '.join(FILTERS)}", "event=die")
        found.setdefault(key, []).append(value)
    return found


def _matches(event: Event, filters: dict[str, list[str]]) -> bool:
    """All keys, and of each any value; of labels all."""
    known = {"container": event.container, "event": event.action, "image": event.image, "type": "container"}
    labels = filters.get("label", [])
    return all(known[key] in values for key, values in filters.items() if key != "label") and all(
        name in event.labels and (not equals or event.labels[name] == value)
        for name, equals, value in (label.partition("=") for label in labels)
    )


def _print(event: Event, form: str) -> None:
    attributes = {**event.labels, **event.more, "image": event.image, "name": event.container}
    if form:
        found = _document(event, attributes)
        if form != "json":  # a template has docker's names of them, which its JSON writes otherwise
            found = {{"id": "ID", "timeNano": "TimeNano"}.get(key, key.title()): value for key, value in found.items()}
        print_each([found], form)
        return
    seconds, below = divmod(event.time_ns, 10**9)
    moment = datetime.fromtimestamp(seconds).astimezone()
    zone = f"{moment:%z}"
    stamp = f"{moment:%Y-%m-%dT%H:%M:%S}.{below:09d}{zone[:3]}:{zone[3:]}"
    shown = ", ".join(f"{name}={value}" for name, value in sorted(attributes.items()))
    print(f"{stamp} container {event.action} {event.container} ({plain(shown)})")


def _document(event: Event, attributes: dict[str, str]) -> dict[str, Any]:
    return {
        "status": event.action,
        "id": event.container,
        "from": event.image,
        "Type": "container",
        "Action": event.action,
        "Actor": {"ID": event.container, "Attributes": attributes},
        "scope": "local",
        "time": event.time_ns // 10**9,
        "timeNano": event.time_ns,
    }
