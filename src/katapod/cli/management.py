"""`kata-runtime metrics` and `iptables`: questions to the management socket of a running sandbox."""

import http.client
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from katapod.cli.settings import Globals, need_root
from katapod.model.errors import InvalidState, KatapodError, UsageError

__all__ = ["ask", "register"]

LIMIT_S = 10.0
FILE_MAX = 4 * 1024 * 1024


def register(app: typer.Typer) -> None:
    app.command(help="Print the metrics of a sandbox, for Prometheus.")(metrics)
    iptables = typer.Typer(no_args_is_help=True, help="Read or set the iptables of a sandbox's guest.")
    iptables.command("get", help="Print them, as iptables-save does.")(get_iptables)
    iptables.command("set", help="Set them from a file, as iptables-restore does.")(set_iptables)
    app.add_typer(iptables, name="iptables")


SandboxId = Annotated[str, typer.Option("--sandbox-id", metavar="SANDBOX", help="The sandbox.")]
V6 = Annotated[bool, typer.Option("--v6", help="ip6tables.")]


def metrics(
    context: typer.Context, sandbox: Annotated[str, typer.Argument(metavar="SANDBOX", help="Name or id.")]
) -> None:
    need_root("metrics")
    sys.stdout.write(ask(context.obj, sandbox, "GET", "/metrics?whole=1").decode(errors="replace"))


def get_iptables(context: typer.Context, sandbox_id: SandboxId, v6: V6 = False) -> None:
    need_root("iptables get")
    sys.stdout.write(ask(context.obj, sandbox_id, "GET", _path(v6)).decode(errors="replace"))


def set_iptables(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Rules, in the format of iptables-save.")],
    sandbox_id: SandboxId,
    v6: V6 = False,
) -> None:
    need_root("iptables set")
    try:
        with file.open("rb") as handle:
            rules = handle.read(FILE_MAX + 1)
    except OSError as exc:
        raise UsageError(f"cannot read {file}: {exc.strerror}") from exc
    if len(rules) > FILE_MAX:
        raise UsageError(f"cannot set the rules of {file}: it has more than {FILE_MAX} bytes")
    ask(context.obj, sandbox_id, "PUT", _path(v6), rules)


def _path(v6: bool) -> str:
    return "/ip6tables" if v6 else "/iptables"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("shim", timeout=LIMIT_S)
        self._socket_path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(LIMIT_S)
        self.sock.connect(self._socket_path)


def ask(settings: Globals, sandbox: str, method: str, path: str, body: bytes | None = None) -> bytes:
    """The answer of the sandbox that `sandbox` names. Raises NotFound, UsageError if several fit, InvalidState if it
    does not run, KatapodError with what it answers."""
    from katapod.sandbox.lookup import find_sandbox

    store = settings.states()
    record = find_sandbox(store, sandbox).record
    where = store.layout.sandbox(record.sandbox_id).management_socket
    connection = _UnixConnection(str(where))
    try:
        connection.request(method, path, body, {"Content-Type": "application/octet-stream"} if body else {})
        answer = connection.getresponse()
        data = answer.read()
    except (FileNotFoundError, ConnectionRefusedError) as exc:
        raise InvalidState(f"cannot ask {sandbox}: it does not run", hint="see: kata-runtime list") from exc
    except (OSError, http.client.HTTPException) as exc:
        raise KatapodError(f"cannot ask {sandbox} on {where}: {exc}") from exc
    finally:
        connection.close()
    if answer.status != 200:
        raise KatapodError(f"cannot {method} {path} of {sandbox}: {data.decode(errors='replace')[:2000]}")
    return data
