"""Whatever a guest, an image or an engine says, no verb of kata-runtime passes it to a terminal as it is."""

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from katapod.cli.program import VERBS
from katapod.model.layout import Layout
from katapod.rpc.pb import agent_pb2, inspection_pb2
from katapod.rpc.server import serve_ttrpc
from katapod.rpc.status import RpcError, StatusCode
from kit.fleet import RecordedGuest, record_of, vmless
from kit.kata import RUN_PREFIX
from kit.templates import kata_command

HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\u202e\x9b31m\nkata-runtime: forged"
NAME = f"{RUN_PREFIX}hostile"
NOTHING_OF_A_GUEST = {
    "run": "its errors are KatapodErrors, its output is the container's",
    "create": "as run",
    "config": "the administrator's",
    "env": "this host's",
    "kata-env": "the same",
    "check": "this host's",
    "kata-check": "the same",
    "factory": "templates hold no container",
    "network": "plugins of root",
    "overhead": "measures",
    "cluster": "of the operator, and of nodes",
    "image": "names are checked when they come in",
    **dict.fromkeys(("images", "rmi", "pull", "import", "load", "save", "tag", "history"), "of images, as image"),
    "container": "the other verbs by another name",
    "info": "env",
    "prune": "names that were checked",
    "system": "figures, and the same names",
    "volume": "names that were checked",
    "version": "of this program",
}
"""Verbs that show nothing a guest has written, besides errors: those go through one class."""


class HostileGuest(RecordedGuest):
    async def call(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        if method == "GetMetrics":
            line = f'kata_guest_netdev_stat{{interface="{HOSTILE.partition(chr(10))[0]}",item="x"}} 1\n'
            return agent_pb2.Metrics(metrics=line)
        if method == "GetIPTables":
            return agent_pb2.GetIPTablesResponse(data=HOSTILE.encode() + b"\xff")
        if method == "GetVolumeStats":
            raise RpcError(StatusCode.INTERNAL, HOSTILE)
        raise RpcError(StatusCode.INTERNAL, f"{method}: {HOSTILE}")

    async def inspect(self, timeout_s: float) -> Any:
        said = inspection_pb2.InspectResponse(kernel=HOSTILE, hostname=HOSTILE, init=HOSTILE)
        said.processes.add(pid=7, parent=1, command=HOSTILE, state=HOSTILE)
        said.mounts.add(source=HOSTILE, target=HOSTILE, fstype=HOSTILE, options=HOSTILE)
        said.links.add(name=HOSTILE, mac=HOSTILE, addresses=[HOSTILE])
        return said


async def _refuse(service: str, method: str, payload: bytes) -> bytes:
    raise RpcError(StatusCode.INTERNAL, f"{method}: {HOSTILE}")


@contextlib.asynccontextmanager
async def hostile_sandbox() -> AsyncIterator[Layout]:
    """A sandbox of this process: its supervisor's sockets answer, and what it says is hostile throughout."""
    layout = Layout()
    record = record_of(NAME, image=HOSTILE, labels={"io.kubernetes.pod.name": HOSTILE})
    container = replace(record.containers[0], command=("sh", HOSTILE), error=HOSTILE)
    record = replace(record, containers=(container,), error=HOSTILE)
    async with vmless(layout, record, HostileGuest()):
        paths = layout.sandbox(NAME)
        paths.console_log.write_text(HOSTILE)
        spec = paths.spec(NAME)
        spec.parent.mkdir(parents=True, exist_ok=True)
        spec.write_text(
            '{"ociVersion": "1.0.2", "process": {"args": ["sh"], "cwd": "/", "user": {}}, "root": {"path": "r"}}'
        )
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(paths.control_socket))
            listener.listen(8)
            server = await serve_ttrpc(listener.dup(), _refuse)
            try:
                yield layout
            finally:
                server.close()


async def _said(*words: str) -> bytes:
    def call() -> bytes:
        done = subprocess.run(
            kata_command(*words), stdin=subprocess.DEVNULL, capture_output=True, timeout=180, check=False
        )
        assert b"internal error" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    return await asyncio.to_thread(call)


async def test_no_verb_lets_a_guest_steer_the_terminal(tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    rules.write_text("*filter\nCOMMIT\n")
    calls: list[tuple[str, ...]] = [
        ("list",),
        ("list", "--json"),
        ("ps",),
        ("--debug", "list"),
        ("stats", "--no-stream", NAME),
        ("stats", "--json", NAME),
        ("logs", NAME),
        ("metrics", NAME),
        ("iptables", "get", "--sandbox-id", NAME),
        ("iptables", "set", "--sandbox-id", NAME, str(rules)),
        ("inspect", NAME),
        ("inspect", "--all", NAME),
        ("inspect", "--json", NAME),
        ("inspect", "--svg", "-", NAME),
        ("exec", NAME, "true"),
        ("exec", "--vm", NAME, "true"),
        ("kill", NAME),
        ("pause", NAME),
        ("resume", NAME),
        ("unpause", NAME),
        ("list", "--format", "{{.Command}} {{.Status}} {{.Labels}}"),
        ("list", "--format", "json"),
        ("inspect", "--format", "{{json .}}", NAME),
        ("inspect", "--format", "{{.Config.Cmd}} {{.State.Error}}", NAME),
        ("top", NAME),
        ("port", NAME),
        ("update", "-m", "64m", NAME),
        ("attach", NAME),
        ("wait", NAME),
        ("stop", "-t", "1", NAME),
        ("start", "-a", NAME),
        ("restart", "-t", "1", NAME),
        ("rename", NAME, f"{NAME}-new"),
        ("events", "--since", "1h", "--until", "0s"),
        ("cp", f"{NAME}:/etc/hostname", str(tmp_path / "copy")),
        ("export", NAME),
        ("diff", NAME),
        ("commit", NAME, "made:1"),
        ("delete", NAME),
        ("rm", NAME),
        ("direct-volume", "stats", "--volume-path", "/nowhere"),
        ("collect-data",),
    ]
    tried = {word for call in calls for word in call if word in VERBS}
    assert tried | NOTHING_OF_A_GUEST.keys() == VERBS.keys(), "say of each verb what of a guest's it shows"
    told = set()
    async with hostile_sandbox():
        for call in calls:
            text = (await _said(*call)).decode()  # so it is UTF-8, too
            steering = [char for char in text if not char.isprintable() and char not in "\n\t"]
            assert not steering, f"{call}: {steering}: {text!r}"
            if "forged" in text or "owned" in text:
                told.add(next(word for word in call if word in VERBS))
    expected = {
        "list",
        "ps",
        "stats",
        "metrics",
        "iptables",
        "inspect",
        "exec",
        "kill",
        "pause",
        "resume",
        "collect-data",
    }
    assert told >= expected, "what this test is about did not come by"
    assert not os.path.exists(f"/run/vc/sbs/{NAME}")
