"""cli: the door for people: `kata-runtime` and its verbs, one file a verb or family.

Verbs are thin: they read flags, call `sandbox`, `images` or `osbuilder`, and print. Heavy imports stand
inside the functions, so that `kata-runtime --help` and completion stay quick.
"""

import os
import signal
import sys

if os.path.basename(sys.argv[0]) == "kata-runtime" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # While the program is loaded there is nothing to undo: Ctrl-C simply ends it, without a trace of its imports.
    # main() puts Python's handler back.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
