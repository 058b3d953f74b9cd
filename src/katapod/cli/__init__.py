"""cli: the door for people: `kata-runtime` and its verbs, one file a verb or family.

Verbs are thin: they read flags, call `sandbox`, `images` or `osbuilder`, and print. program.py has the table of them;
command.py is what they are declared with. A verb's module is loaded when the verb is called, and what only some of its
uses need is imported inside the functions: a command line waits for each import.
"""

import gc
import os
import signal
import sys

__all__ = ["is_loaded"]


def is_loaded() -> None:
    """To be called by a verb that goes on for a while, once its modules are loaded."""
    gc.freeze()
    gc.enable()


if os.path.basename(sys.argv[0]) == "kata-runtime":
    # A fifth of the start of `run`, 0.03 s, would go into these two: asyncio loads ssl if it can, which no part of us
    # uses, and the garbage collector looks again and again through modules that stay.
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
    gc.disable()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # While the program is loaded there is nothing to undo: Ctrl-C simply ends it, without a trace of its imports.
        # An exception could be lost there: C code that asks for an attribute takes any for its absence.
        # main() puts Python's handler back, unless the verb has handlers of its own.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
