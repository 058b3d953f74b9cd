"""The paths of kata-monitor, over sandboxes without a VM."""

import contextlib
import json
import os
import tempfile
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from katapod.host.state import StateStore
from katapod.model.attachment import AttachmentRecord, PublishedPort
from katapod.model.cni import NetworkConfig
from katapod.model.layout import Layout
from katapod.model.record import SandboxRecord, State
from katapod.monitor import fleet
from katapod.monitor import service as service_module
from katapod.monitor.ask import ask
from katapod.monitor.fleet import Fleet
from katapod.monitor.options import Address
from katapod.monitor.service import MonitorService
from katapod.monitor.together import ask_together
from katapod.monitor.token import read_token
from katapod.rpc.http import HttpError, Request, Response
from kit.fleet import record_of, silent, vmless
from kit.loop_time import LIMIT_S


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that live have answered, however busy the machine is."""

    async def ask_patiently(path: str, target: str, limit_s: float) -> bytes:
        return await ask(path, target, LIMIT_S)

    for module in (fleet, service_module):
        monkeypatch.setattr(module, "ask", ask_patiently)
        monkeypatch.setattr(module, "ask_together", partial(ask_together, grace_s=LIMIT_S))


@pytest.fixture
async def layout() -> AsyncIterator[Layout]:
    with tempfile.TemporaryDirectory(prefix="kp") as root:
        yield Layout(state_root=Path(root) / "sbs")


def service(layout: Layout, address: str = "127.0.0.1") -> MonitorService:
    return MonitorService(layout, Fleet(layout, (layout.state_root,)), Address(address, 8090), TOKEN)


TOKEN = "t0ken"
ROOT = {"authorization": f"Bearer {TOKEN}"}


async def get(monitor: MonitorService, path: str, method: str = "GET", **headers: str) -> Response:
    target, _, query = path.partition("?")
    pairs = dict(pair.split("=") for pair in query.split("&") if pair)
    return await monitor.handle(Request(method, target, pairs, headers))


async def refused(monitor: MonitorService, path: str, method: str = "GET", **headers: str) -> HttpError:
    with pytest.raises(HttpError) as caught:
        await get(monitor, path, method, **headers)
    return caught.value


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8090", "127.0.0.1.evil.example:8090", "10.0.0.1:8090"])
async def test_a_foreign_name_on_loopback(layout: Layout, host: str) -> None:
    assert (await refused(service(layout), "/", host=host)).status == 403
    assert (await get(service(layout, "0.0.0.0"), "/", host=host)).status == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8090", "127.0.0.1:8090", "[::1]:8090", "127.1.2.3"])
async def test_names_of_this_host(layout: Layout, host: str) -> None:
    assert (await get(service(layout), "/sandboxes", host=host)).body == b""


async def test_what_is_not_there(layout: Layout) -> None:
    monitor = service(layout)
    for path in ("/debug/pprof/", "/debug/pprof/heap", "/debug/vars"):
        error = await refused(monitor, path)
        assert error.status == 404
        assert "py-spy" in error.text
    assert (await refused(monitor, "/web/../main.py")).status == 404
    assert (await refused(monitor, "/metrics", "POST")).status == 405
    assert (await refused(monitor, "/debug/tracemalloc")).status == 404
    for path in ("/agent-url", "/agent-url?sandbox=x", "/metrics?sandbox=x", "/api/sandbox?sandbox=.."):
        assert (await refused(monitor, path)).status == 400


async def test_the_page_and_its_policy(layout: Layout) -> None:
    monitor = service(layout)
    assert b"/metrics" in (await get(monitor, "/")).body
    for path in ("/", "/web/app.js", "/web/plot.js", "/web/style.css"):
        answer = await get(monitor, path, accept="text/html")
        assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
        assert b"http://" not in answer.body.replace(b"http://www.w3.org/2000/svg", b"")
    packed = await get(monitor, "/web/app.js", **{"accept-encoding": "br, gzip"})
    assert packed.headers["Content-Encoding"] == "gzip"


async def test_sandboxes(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "ask_together", partial(ask_together, grace_s=0.1))  # for the silent one
    monitor = service(layout)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(vmless(layout, record_of("one")))
        stack.enter_context(silent(layout, record_of("two")))
        assert (await get(monitor, "/sandboxes")).body == b"one\ntwo\n"
        assert b'href="/metrics?sandbox=one"' in (await get(monitor, "/sandboxes", accept="text/html")).body
        assert (await get(monitor, "/agent-url?sandbox=one")).body == b"vsock://42:1024\n"
        found = json.loads((await get(monitor, "/api/sandboxes", **ROOT)).body)
        assert [(row["sandbox_id"], row["state"]) for row in found["sandboxes"]] == [
            ("one", "running"),
            ("two", "hangs"),
        ]
        assert found["sandboxes"][0]["use"]["memory"]["supervisor"] > 1 << 20
        detail = json.loads((await get(monitor, "/api/sandbox?sandbox=one", **ROOT)).body)
        assert detail["sandbox"]["use"]["guest"]["memory_total"] > 100 << 20
        assert [event["text"] for event in detail["events"]] == ["created", "container one started"]


async def test_a_console_is_text(layout: Layout) -> None:
    monitor = service(layout)
    async with vmless(layout, record_of("one")):
        log = layout.sandbox("one").console_log
        assert (await get(monitor, "/api/console?sandbox=one", **ROOT)).body == b""
        log.write_bytes(b"x" * 100_000 + b"\x1b[31mred\x1b[0m\r\n\x1b]0;title\x07\x08a\xff\tb\n")
        text = (await get(monitor, "/api/console?sandbox=one", **ROOT)).body.decode()
        assert text.endswith("xred\na\ufffd\tb\n")
        assert len(text) < 40_000
        log.unlink()
        log.symlink_to("/etc/passwd")
        assert (await get(monitor, "/api/console?sandbox=one", **ROOT)).body == b""


def states(sandbox_id: str, **containers: State) -> SandboxRecord:
    record = record_of(sandbox_id)
    items = [replace(record.containers[0], container_id=name, state=state) for name, state in containers.items()]
    return replace(record, containers=tuple(items))


async def test_a_paused_sandbox_is_shown_as_paused(layout: Layout) -> None:
    running, paused, stopped = State.RUNNING, State.PAUSED, State.STOPPED
    async with contextlib.AsyncExitStack() as stack:
        for record in (
            states("a", a=paused),
            states("b", b=running, work=paused, done=stopped),  # engines pause all but the pause container
            states("c", c=running, work=paused, other=running),
            states("d", d=running, done=stopped),
            states("e", e=paused, work=running),
        ):
            await stack.enter_async_context(vmless(layout, record))
        found = json.loads((await get(service(layout), "/api/sandboxes")).body)
        assert {row["sandbox_id"]: row["state"] for row in found["sandboxes"]} == {
            "a": "paused",
            "b": "paused",
            "c": "running",
            "d": "running",
            "e": "running",
        }


async def test_events_have_the_names_of_pods(layout: Layout) -> None:
    monitor = service(layout)
    pod = {"io.kubernetes.pod.name": "web", "io.kubernetes.pod.namespace": "shop"}
    await get(monitor, "/api/sandboxes")
    async with vmless(layout, record_of("b", labels=pod)), vmless(layout, record_of("a")):
        monitor._fleet._taken_at = float("-inf")
        await get(monitor, "/api/sandboxes")
    monitor._fleet._taken_at = float("-inf")
    found = json.loads((await get(monitor, "/api/sandboxes")).body)["events"]
    assert [(event["sandbox_id"], event["name"], event["text"]) for event in found] == [
        ("a", "", "is running"),
        ("b", "shop/web", "is running"),
        ("a", "", "ended and was removed"),
        ("b", "shop/web", "ended and was removed"),
    ]


SECRET = "s3cret of the command or the guest"


async def test_what_is_for_root_alone(layout: Layout) -> None:
    """Any user of the host reaches the address; /run/vc/sbs has mode 0700."""
    monitor = service(layout)
    running, ended = record_of("one", SECRET, labels={"x": SECRET}), record_of("two", SECRET)
    container = replace(running.containers[0], command=("sh", SECRET), error=SECRET)
    network = NetworkConfig("bridge", "1.0.0", ())
    running = replace(
        running, attachment=AttachmentRecord(network, "/x", (), "", addresses=(SECRET,), ports=(PublishedPort(1, 2),))
    )
    ended = replace(ended, state=State.STOPPED, error=SECRET)
    async with vmless(layout, replace(running, containers=(container,))) as managed, vmless(layout, ended):
        assert managed.sandbox_id == "one"
        layout.sandbox("one").console_log.write_text(SECRET)
        await get(monitor, "/api/sandboxes")  # so that there are events of a change
        StateStore(layout).write(replace(running, state=State.STOPPED, error=SECRET))
        monitor._fleet._taken_at = float("-inf")
        figures = ("/metrics", "/sandboxes", "/api/sandboxes", "/api/sandbox?sandbox=one", "/api/sandbox?sandbox=two")
        for path in (*figures, "/agent-url?sandbox=one", "/metrics?sandbox=one"):
            assert SECRET.encode() not in (await get(monitor, path)).body, path
        listing = json.loads((await get(monitor, "/api/sandboxes")).body)
        assert [event["text"] for event in listing["events"]] == ["is stopped"]
        assert not listing["whole"]
        for wrong in ({}, {"authorization": "Bearer "}, {"authorization": TOKEN}, {"authorization": "Bearer t0kem"}):
            for path in ("/api/console?sandbox=one", "/api/picture?sandbox=one"):
                error = await refused(monitor, path, **wrong)
                assert error.status == 403
                assert "kata-monitor --link" in error.text
        assert [row["ports"] for row in listing["sandboxes"]] == [[], []]
        whole = json.loads((await get(monitor, "/api/sandboxes", **ROOT)).body)
        assert whole["whole"]
        assert [row["image"] for row in whole["sandboxes"]] == [SECRET, SECRET]
        assert [row["addresses"] for row in whole["sandboxes"]] == [[SECRET], []]
        assert [event["why"] for event in whole["events"]] == [SECRET]
        assert SECRET.encode() in (await get(monitor, "/api/console?sandbox=one", **ROOT)).body
    nobody = MonitorService(layout, Fleet(layout, (layout.state_root,)), Address("127.0.0.1", 8090), "")
    assert (await refused(nobody, "/api/console?sandbox=one", authorization="Bearer ")).status == 403


def test_a_token_is_roots_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "kata-monitor" / "token"
    token = read_token(path)
    assert len(token) == 32
    assert read_token(path) == token
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert list(path.parent.iterdir()) == [path]
    path.chmod(0o644)
    with pytest.raises(PermissionError, match="others can read it"):
        read_token(path)


async def test_an_supervisor_that_was_killed(layout: Layout) -> None:
    store = StateStore(layout)
    os.close(store.create(record_of("dead")))
    (row,) = await Fleet(layout, (layout.state_root,)).rows()
    assert (row.state, row.problem) == ("lost", "the process that ran it was killed")
