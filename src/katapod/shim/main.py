"""The command line of `containerd-shim-kata-v2`.

Flags have a single dash, as containerd and CRI-O write them. Imports little: every pod waits for `start`.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["Arguments", "UsageError", "main", "parse_arguments"]

USAGE = """\
usage: containerd-shim-kata-v2 -namespace NS -id ID [-address PATH] [-publish-binary PATH] [-bundle DIR] [-debug] ACTION
       containerd-shim-kata-v2 -v | -info | features

The runtime shim of Katapod, started by containerd and CRI-O, not by people.

  start    start the server of a sandbox and print its address; the working directory is the bundle
  delete   remove all that is left of a container or sandbox, and print its exit as a protobuf message
  features  print what containers may ask for, as JSON of OCI's form
  (none)   serve on descriptor 3

People use kata-runtime; docs/how-to/containerd.md and crio.md say how to set an engine up.
"""
TEXTS = ("namespace", "id", "address", "publish-binary", "bundle", "socket", "debug-socket")
SWITCHES = ("debug", "v", "version", "info", "h", "help")
ACTIONS = ("", "start", "delete", "features")


class UsageError(Exception):
    """The command line is wrong."""


class Arguments:
    """What containerd passed. `address` is its main socket; empty under CRI-O."""

    def __init__(self, texts: dict[str, str], switches: set[str], action: str) -> None:
        self.namespace = texts.get("namespace", "")
        self.id = texts.get("id", "")
        self.address = texts.get("address", "")
        self.bundle = texts.get("bundle", "") or os.getcwd()
        self.debug = "debug" in switches
        self.version = bool(switches & {"v", "version"})
        self.info = "info" in switches
        self.help = bool(switches & {"h", "help"})
        self.action = action
        self.asks_only = self.version or self.info or self.help or action == "features"


def parse_arguments(words: list[str]) -> Arguments:
    """Raises UsageError."""
    texts: dict[str, str] = {}
    switches: set[str] = set()
    action = ""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            if action:
                raise UsageError(f"more than one action: {action}, {word}")
            action = word
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if name in SWITCHES:
            if value not in ("", "true"):
                raise UsageError(f"-{name} takes no value")
            switches.add(name)
        elif name in TEXTS:
            if not equals:
                if not rest:
                    raise UsageError(f"-{name} needs a value")
                value = rest.pop(0)
            texts[name] = value
        else:
            raise UsageError(f"unknown flag {word}")
    if action not in ACTIONS:
        raise UsageError(f"unknown action {action!r}: use start, delete or features")
    found = Arguments(texts, switches, action)
    if not found.asks_only:
        for name in ("id", "namespace"):
            if not texts.get(name):
                raise UsageError(f"missing flag -{name}")
    return found


def main() -> NoReturn:
    """Exits: 0, or 1 with an error on standard error, which containerd passes on."""
    os._exit(_run(sys.argv[1:]))  # skip finalizers: they would take as long as the rest of `start`


def _run(words: list[str]) -> int:
    try:
        arguments = parse_arguments(words)
    except UsageError as exc:
        print(f"containerd-shim-kata-v2: {exc}\n{USAGE}", end="", file=sys.stderr)
        return 2
    if arguments.asks_only:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in `-h | head`: nothing to undo or to report
    if arguments.help:
        print(USAGE, end="", flush=True)
        return 0
    try:
        if arguments.asks_only:
            from katapod.shim.about import print_features, print_info, print_version

            (print_version if arguments.version else print_info if arguments.info else print_features)()
        elif arguments.action == "start":
            from katapod.shim.start import start

            start(arguments)
        elif arguments.action == "delete":
            from katapod.shim.delete import delete

            delete(arguments)
        else:
            from katapod.shim.start import SERVER_FD, serve_forever

            serve_forever(arguments, SERVER_FD)
    except Exception as exc:
        from katapod.model.plain import LINES, plain

        hint = getattr(exc, "hint", "")
        print(plain(f"{exc}" + (f" ({hint})" if hint else ""), keep=LINES), file=sys.stderr, flush=True)
        return 1
    sys.stdout.flush()
    return 0
