"""The command line of `containerd-shim-kata-v2`.

Flags have a single dash, as containerd and CRI-O write them. Imports little: every pod waits for `start`.
"""

from __future__ import annotations

import os
import signal
import sys

from katapod.shim.arguments import UsageError, parse_arguments

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["main"]

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
            from katapod.shim.version import print_features, print_info, print_version

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
