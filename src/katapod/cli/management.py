"""`kata-runtime metrics` and `iptables`: questions to the management socket of a running sandbox."""

import http.client
import socket
import sys

import click

from katapod.cli.command import HOST_PATH, argument, flag, group, option, verb
from katapod.cli.settings import Globals, need_root
from katapod.model.errors import InvalidState, KatapodError, UsageError

__all__ = ["ask", "iptables", "metrics"]

LIMIT_S = 10.0
FILE_MAX = 4 * 1024 * 1024


@verb("metrics")
@argument("sandbox", metavar="SANDBOX", help="Name or ID of the sandbox.")
@click.pass_obj
def metrics(settings: Globals, sandbox: str) -> None:
    """Print the metrics of a sandbox, for Prometheus."""
    need_root("metrics")
    sys.stdout.write(ask(settings, sandbox, "GET", "/metrics?whole=1").decode(errors="replace"))


the_sandbox = option("--sandbox-id", metavar="SANDBOX", required=True, help="Name or ID of the sandbox.")
the_version = flag("--v6", help="ip6tables.")


@group()
def iptables() -> None:
    """Get or set the iptables rules of a sandbox's guest."""


@iptables.command()
@the_sandbox
@the_version
@click.pass_obj
def get(settings: Globals, sandbox_id: str, v6: bool) -> None:
    """Print the rules, as iptables-save does."""
    need_root("iptables get")
    sys.stdout.write(ask(settings, sandbox_id, "GET", _path(v6)).decode(errors="replace"))


@iptables.command("set")
@argument("file", metavar="FILE", type=HOST_PATH, help="Rules, in the format of iptables-save.")
@the_sandbox
@the_version
@click.pass_obj
def set_(settings: Globals, file: str, sandbox_id: str, v6: bool) -> None:
    """Load rules from a file, as iptables-restore does."""
    need_root("iptables set")
    try:
        with open(file, "rb") as handle:
            rules = handle.read(FILE_MAX + 1)
    except OSError as exc:
        raise UsageError(f"cannot read {file}: {exc.strerror}") from exc
    if len(rules) > FILE_MAX:
        raise UsageError(f"cannot set the rules of {file}: it has more than {FILE_MAX} bytes")
    ask(settings, sandbox_id, "PUT", _path(v6), rules)


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
    from katapod.host.locks import is_stopped
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
        raise InvalidState(f"cannot ask {sandbox}: it is not running", hint="see: kata-runtime list") from exc
    except (OSError, http.client.HTTPException) as exc:
        if is_stopped(record.supervisor_pid):
            raise InvalidState(
                f"cannot ask {sandbox}: its supervisor, process {record.supervisor_pid}, is stopped by a signal",
                hint=f"let it go on: kill -CONT {record.supervisor_pid}",
            ) from exc
        raise KatapodError(f"cannot ask {sandbox} on {where}: {exc}") from exc
    finally:
        connection.close()
    if answer.status != 200:
        raise KatapodError(f"cannot {method} {path} of {sandbox}: {data.decode(errors='replace')[:2000]}")
    return data
