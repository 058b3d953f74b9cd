"""The paths that kata-monitor serves: upstream's for Prometheus, and the page with its data. Read-only.

Any page that a browser shows can make it send requests here: so no request changes anything, and on a loopback address
the Host header must name this host (a foreign name that resolves to 127.0.0.1 is DNS rebinding).
"""

import asyncio
import gzip
import html
import os
import re
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from importlib.resources import files
from urllib.parse import quote

import msgspec

from katapod.host.state import StateStore
from katapod.model.errors import KatapodError
from katapod.model.json_text import encode_json
from katapod.model.layout import Layout
from katapod.model.plain import console_text
from katapod.model.record import SandboxRecord
from katapod.monitor.ask import AnswerError, ask
from katapod.monitor.exposition import Families, label_text, merge, render
from katapod.monitor.fleet import METRICS_LIMIT_S, Entry, Event, Fleet, Row, without_secrets
from katapod.monitor.options import Address
from katapod.monitor.together import ask_together
from katapod.monitor.token import is_given
from katapod.observe.process_metrics import METRICS_TYPE, call_times_text, family_text, standard_process_text
from katapod.rpc.call_times import CallTimes
from katapod.rpc.http import HttpError, Request, Response

__all__ = ["MonitorService"]

GZIP_LEAST = 1024  # bytes
CONSOLE_BYTES = 32 * 1024
PICTURE_LIMIT_S = 10.0
WEB_FILES = {
    "/web/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/web/plot.js": ("plot.js", "text/javascript; charset=utf-8"),
    "/web/style.css": ("style.css", "text/css; charset=utf-8"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFETY = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
PROFILE_HINT = """\
kata-monitor and Katapod's shims are Python programs without pprof. Use instead:
  py-spy top --pid PID, py-spy dump --pid PID   what a process is doing (py-spy is a package on PyPI)
  /debug/tracemalloc                            kata-monitor's memory allocations, if run with -log-level trace
"""
FOR_ROOT = """\
only root of the host may see this. Open the address that kata-monitor --link prints, or send its token:
  curl -H "Authorization: Bearer $(cat /run/kata-monitor/token)" ...
"""
ENDPOINTS = {
    "/metrics": "metrics of all sandboxes; sandbox=ID for one, filter_family=PREFIX,... for some families",
    "/sandboxes": "the sandboxes of this host",
    "/agent-url": "the address of a sandbox's agent: sandbox=ID",
    "/api/sandboxes": "what the page shows, as JSON; images and errors with the token of kata-monitor --link",
    "/debug/tracemalloc": "memory allocations of kata-monitor",
}


class MonitorService:
    """`token` proves that a client is root's; if it is empty, no client is."""

    def __init__(self, layout: Layout, fleet: Fleet, address: Address, token: str) -> None:
        self._token = token
        self._store = StateStore(layout)
        self._fleet = fleet
        self._address = address
        self._scrapes = self._failed = 0
        self._times = CallTimes(
            "kata_monitor_scrape_durations_histogram_milliseconds", "How long scrapes took, milliseconds."
        )
        self._routes: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/": self._root,
            "/metrics": self._metrics,
            "/sandboxes": self._sandboxes,
            "/agent-url": self._agent_url,
            "/debug/tracemalloc": self._tracemalloc,
            "/api/sandboxes": self._api_sandboxes,
            "/api/sandbox": self._api_sandbox,
            "/api/console": self._api_console,
            "/api/picture": self._api_picture,
        }

    async def handle(self, request: Request) -> Response:
        """Raises HttpError."""
        self._check_host(request)
        if request.method not in ("GET", "HEAD"):
            raise HttpError(405, f"cannot {request.method}: kata-monitor only answers GET")
        if request.path in WEB_FILES:
            name, kind = WEB_FILES[request.path]
            return _packed(request, Response(_web_file(name), content_type=kind, headers=SAFETY))
        route = self._routes.get(request.path)
        if route is None:
            if request.path.startswith("/debug/"):
                raise HttpError(404, PROFILE_HINT)
            raise HttpError(404, f"there is nothing at {request.path[:200]}; endpoints: {', '.join(ENDPOINTS)}\n")
        return _packed(request, await route(request))

    def _check_host(self, request: Request) -> None:
        if not self._address.is_loopback:
            return
        host = request.headers.get("host", "")
        name = host.rpartition(":")[0] if re.search(r":[0-9]*$", host) else host
        if name and not Address(name.strip("[]").lower(), 0).is_loopback and name != self._address.host:
            raise HttpError(403, f"kata-monitor listens on {self._address} and is not known by that name")

    async def _root(self, request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return Response(_web_file("index.html"), content_type="text/html; charset=utf-8", headers=SAFETY)
        lines = ["Endpoints of kata-monitor (a browser sees a page here):"]
        lines += [f"  {path:<20} {what}" for path, what in ENDPOINTS.items()]
        return Response(("\n".join(lines) + "\n").encode(), headers=SAFETY)

    async def _metrics(self, request: Request) -> Response:
        self._scrapes += 1
        began = time.monotonic()
        try:
            wanted = request.query.get("sandbox", "")
            if wanted:
                return Response(await self._ask(self._entry(request), "/metrics"), content_type=METRICS_TYPE)
            prefixes = [prefix for prefix in request.query.get("filter_family", "").split(",") if prefix]
            body = await self._all_metrics(prefixes)
        except HttpError:
            self._failed += 1
            raise
        finally:
            self._times.observe("", time.monotonic() - began)
        return Response(body, content_type=METRICS_TYPE)

    async def _all_metrics(self, prefixes: list[str]) -> bytes:
        """A sandbox that does not respond is left out and counted. kata-monitor's own metrics only without
        `prefixes`."""
        entries = [entry for entry in self._fleet.entries() if os.path.exists(entry.socket)]
        answers = await ask_together([self._try(entry) for entry in entries])
        self._failed += answers.count(None)
        own = "" if prefixes else self._own_metrics(len(entries))
        texts = [(answer, label_text(entry.labels)) for entry, answer in zip(entries, answers, strict=True) if answer]
        return await asyncio.to_thread(_merged, own, texts, prefixes)  # let other requests proceed

    def _own_metrics(self, count: int) -> str:
        return "".join(
            [
                family_text("kata_monitor_running_shim_count", "gauge", "Sandboxes known.", [({}, count)]),
                family_text("kata_monitor_scrape_count", "counter", "Scrapes so far.", [({}, self._scrapes)]),
                family_text(
                    "kata_monitor_scrape_failed_count",
                    "counter",
                    "Sandboxes that did not answer a scrape, and scrapes of one that failed.",
                    [({}, self._failed)],
                ),
                call_times_text(self._times),
                standard_process_text("kata_monitor", os.getpid()),
            ]
        )

    async def _try(self, entry: Entry) -> bytes | None:
        try:
            return await self._ask(entry, "/metrics")
        except HttpError:
            return None

    async def _ask(self, entry: Entry, target: str) -> bytes:
        """Raises HttpError."""
        try:
            return await ask(entry.socket, target, METRICS_LIMIT_S)
        except TimeoutError as exc:
            text = f"sandbox {entry.sandbox_id} did not answer within {METRICS_LIMIT_S:g} s"
            raise HttpError(500, text) from exc
        except AnswerError as exc:
            text = f"cannot ask sandbox {entry.sandbox_id}, it may be stopped or deleted: {exc}"
            raise HttpError(400 if exc.refused else 500, text) from exc

    def _entry(self, request: Request) -> Entry:
        """Raises HttpError."""
        wanted = request.query.get("sandbox", "")
        if not wanted:
            raise HttpError(400, "the parameter sandbox=ID is missing; /sandboxes lists them\n")
        entry = self._fleet.find(wanted)
        if entry is None:
            raise HttpError(400, f"there is no sandbox {wanted[:100]}: it may be stopped or deleted\n")
        return entry

    async def _sandboxes(self, request: Request) -> Response:
        ids = [entry.sandbox_id for entry in self._fleet.entries() if os.path.exists(entry.socket)]
        if "text/html" not in request.headers.get("accept", ""):
            return Response("".join(f"{each}\n" for each in ids).encode(), headers=SAFETY)
        items = "".join(
            f'<li>{html.escape(each)}: <a href="/metrics?sandbox={quote(each)}">metrics</a>, '
            f'<a href="/agent-url?sandbox={quote(each)}">agent</a>, <a href="/#{quote(each)}">page</a></li>\n'
            for each in ids
        )
        head = (
            '<!doctype html><meta charset="utf-8"><title>Sandboxes</title><link rel="stylesheet" href="/web/style.css">'
        )
        body = f"{head}<main><h1>Sandboxes</h1><ul>\n{items}</ul></main>"
        return Response(body.encode(), content_type="text/html; charset=utf-8", headers=SAFETY)

    async def _agent_url(self, request: Request) -> Response:
        try:
            return Response((await self._ask(self._entry(request), "/agent-url")).rstrip(b"\n") + b"\n")
        except HttpError as exc:
            raise HttpError(400, exc.text) from exc

    async def _tracemalloc(self, request: Request) -> Response:
        if not tracemalloc.is_tracing():
            raise HttpError(404, "tracemalloc is off: run kata-monitor with -log-level trace\n")
        snapshot = await asyncio.to_thread(tracemalloc.take_snapshot)
        now, peak = tracemalloc.get_traced_memory()
        lines = [f"{now} bytes now, {peak} at most", *map(str, snapshot.statistics("lineno")[:40])]
        return Response(("\n".join(lines) + "\n").encode(), headers=SAFETY)

    def _is_root(self, request: Request) -> bool:
        return is_given(self._token, request.headers.get("authorization", ""))

    def _need_root(self, request: Request) -> None:
        """Raises HttpError."""
        if not self._is_root(request):
            raise HttpError(403, FOR_ROOT)

    async def _api_sandboxes(self, request: Request) -> Response:
        rows, events, is_root = await self._fleet.rows(), list(self._fleet.events), self._is_root(request)
        if not is_root:
            rows = [without_secrets(row) for row in rows]
            events = [msgspec.structs.replace(event, why="") for event in events]
        return _json(_Listing(time.time(), rows, events, whole=is_root))

    async def _api_sandbox(self, request: Request) -> Response:
        entry = self._entry(request)
        if not self._is_root(request):
            return _json(_Detail(time.time(), without_secrets(await self._fleet.row(entry)), [], None, whole=False))
        events = [
            *_recorded(entry.record),
            *(event for event in self._fleet.events if event.sandbox_id == entry.sandbox_id),
        ]
        events.sort(key=lambda event: event.at)
        record = entry.record
        return _json(_Detail(time.time(), await self._fleet.row(entry), events, record, whole=True))

    async def _api_console(self, request: Request) -> Response:
        """The tail of the guest's console, without terminal control sequences."""
        self._need_root(request)
        entry = self._entry(request)
        try:
            with open(entry.directory / "console.log", "rb", opener=_no_link) as handle:
                size = handle.seek(0, os.SEEK_END)
                handle.seek(max(0, size - CONSOLE_BYTES))
                data = handle.read(CONSOLE_BYTES)
        except OSError:
            data = b""
        return Response(console_text(data).encode(), headers=SAFETY)

    async def _api_picture(self, request: Request) -> Response:
        self._need_root(request)
        entry = self._entry(request)
        # large, and needed only for pictures
        from katapod.observe.inspection import collect_facts
        from katapod.observe.picture import render_picture

        try:
            async with asyncio.timeout(PICTURE_LIMIT_S):
                picture = render_picture(await collect_facts(self._store, entry.sandbox_id))
        except TimeoutError as exc:
            raise HttpError(500, f"sandbox {entry.sandbox_id} did not answer within {PICTURE_LIMIT_S:g} s") from exc
        except KatapodError as exc:
            raise HttpError(400, str(exc)) from exc
        headers = SAFETY | {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return Response(picture.encode(errors="replace"), content_type="image/svg+xml; charset=utf-8", headers=headers)


def _merged(own: str, texts: list[tuple[bytes, str]], prefixes: list[str]) -> bytes:
    families: Families = {}
    for text, labels in texts:
        merge(families, text.decode(errors="replace"), labels, prefixes)
    return "".join([own, *render(families)]).encode()


class _Listing(msgspec.Struct):
    now: float
    sandboxes: list[Row]
    events: list[Event]
    whole: bool  # nothing is left out


class _Detail(msgspec.Struct):
    now: float
    sandbox: Row
    events: list[Event]
    record: SandboxRecord | None
    whole: bool


def _recorded(record: SandboxRecord | None) -> list[Event]:
    """Past events, from the record."""
    if record is None:
        return []
    name = record.sandbox_id
    found = [Event(record.created_at, name, "created")]
    for container in record.containers:
        if container.started_at:
            found.append(Event(container.started_at, name, f"container {container.container_id} started"))
        if container.finished_at:
            how = f"with status {container.exit_code}" if container.exit_code is not None else ""
            how += ", out of memory" if container.oom_killed else ""
            why = container.error
            found.append(Event(container.finished_at, name, f"container {container.container_id} ended {how}", why))
    return found


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


def _json(value: object) -> Response:
    return Response(encode_json(value), content_type="application/json", headers=SAFETY)


_files: dict[str, bytes] = {}


def _web_file(name: str) -> bytes:
    if name not in _files:
        _files[name] = files("katapod.monitor").joinpath("web", name).read_bytes()
    return _files[name]


def _packed(request: Request, response: Response) -> Response:
    """Compressed by gzip if the client accepts that and it pays."""
    accepted = {part.partition(";")[0].strip() for part in request.headers.get("accept-encoding", "").split(",")}
    if len(response.body) < GZIP_LEAST or "gzip" not in accepted:
        return response
    headers = {**response.headers, "Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
    body = gzip.compress(response.body, compresslevel=1, mtime=0)
    return Response(body, response.status, response.content_type, headers)
