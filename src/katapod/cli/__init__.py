"""cli: the entry point for people: `kata-runtime` and its verbs, one file a verb or family.

Verbs are thin: they read flags, call `sandbox`, `images` or `osbuilder`, and print. program.py has the table of them;
command.py is what they are declared with. A verb's module is loaded when the verb is called, and what only some of its
uses need is imported inside the functions: a command line waits for each import.
"""

import gc
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:  # what `signal` wraps in enumerations, 5 ms of imports
    import _signal as signal

__all__ = ["is_loaded"]

WELL_KNOWN_TYPES = "google.protobuf.internal.well_known_types"


def is_loaded() -> None:
    """To be called by a verb that goes on for a while, once its modules are loaded."""
    gc.freeze()
    gc.enable()


if os.path.basename(sys.argv[0]) == "kata-runtime":
    # A fifth of the start of `run`, 0.03 s, would go into these: asyncio loads ssl if it can, which no part of us uses,
    # msgspec what typing has by now; the garbage collector looks again and again through modules that stay; and
    # protobuf's C core loads helpers for messages that we do not have (agent/main.py).
    for name in ("ssl", "typing_extensions"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    if WELL_KNOWN_TYPES not in sys.modules:
        sys.modules[WELL_KNOWN_TYPES] = type(sys)(WELL_KNOWN_TYPES)
        sys.modules[WELL_KNOWN_TYPES].WKTBASES = {}  # type: ignore[attr-defined]
    gc.disable()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # While the program is loaded there is nothing to undo: Ctrl-C simply ends it, without a trace of its imports.
        # An exception could be lost there: C code that asks for an attribute takes any for its absence.
        # main() puts Python's handler back, unless the verb has handlers of its own.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
