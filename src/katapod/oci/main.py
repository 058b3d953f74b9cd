"""The OCI command line: its words to the function that carries them out, and errors to where engines read them."""

from __future__ import annotations

import os
import sys

from katapod.oci.arguments import Call, parse_call
from katapod.oci.errors import OciError
from katapod.oci.wire import Gone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

__all__ = ["main"]

EXEC_FAILED = 255
VERBS = {
    "create": ("starting", "create"),
    "start": ("starting", "start"),
    "run": ("starting", "run"),
    "state": ("looking", "state"),
    "list": ("looking", "list_containers"),
    "ps": ("looking", "processes"),
    "events": ("looking", "events"),
    "kill": ("signalling", "kill"),
    "pause": ("signalling", "pause"),
    "resume": ("signalling", "resume"),
    "delete": ("deletion", "delete"),
    "exec": ("exec_command", "execute"),
    "update": ("updating", "update"),
    "spec": ("describing", "spec"),
    "features": ("describing", "features"),
    "checkpoint": ("refused", "checkpoint"),
    "restore": ("refused", "restore"),
}
"""Module and function of each: a command loads its own alone."""


def main(words: list[str]) -> NoReturn:
    """Exits: 0; 1 with an error on standard error and in --log; of `run` and `exec` the status of the process."""
    call = Call()
    status = 1
    try:
        parse_call(words, call)
        status = _answer(call) if call.asks else _function(call.verb)(call)
        sys.stdout.flush()
    except BrokenPipeError:
        status = 141
    except (OciError, Gone, OSError) as exc:
        _tell(call, str(exc))
        status = EXEC_FAILED if call.verb == "exec" else exc.status if isinstance(exc, OciError) else 1
    except KeyboardInterrupt:
        status = 130
    os._exit(status)  # skip finalizers: they would take as long as the rest


def _function(verb: str) -> Callable[[Call], int]:
    from importlib import import_module

    module, name = VERBS[verb]
    found: Callable[[Call], int] = getattr(import_module(f"katapod.oci.{module}"), name)
    return found


def _answer(call: Call) -> int:
    from katapod.oci import describing

    return describing.version(call) if call.asks == "version" else describing.usage(call)


def _tell(call: Call, text: str) -> None:
    """containerd takes the last line of the log for the message, Podman the only one: nothing else is ever written."""
    text = " ".join(text.splitlines())
    sys.stderr.write(f"kata-runtime: {text}\n")
    sys.stderr.flush()
    if not call.log or call.log == "/dev/stderr":
        return
    import time

    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if call.log_format == "json":
        import json

        line = json.dumps({"level": "error", "msg": text, "time": now})
    else:
        line = f'time="{now}" level=error msg="{text}"'
    try:
        with open(call.log, "a") as handle:
            handle.write(line + "\n")
    except OSError as exc:
        sys.stderr.write(f"kata-runtime: cannot write {call.log}: {exc.strerror}\n")
