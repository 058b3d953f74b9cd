"""`kata-runtime`: the program and the one place that turns errors into messages and exit codes."""

import gc
import os
import select
import signal
import sys
from typing import NoReturn

import click

from katapod.cli import is_loaded
from katapod.cli.plain_output import guard_output
from katapod.cli.program import VERBS, kata_runtime
from katapod.cli.settings import print_error
from katapod.host.trace import span, start_tracing
from katapod.model.errors import KatapodError

__all__ = ["call", "explain", "flush_output", "load_command", "main"]

RUNTIME_FAILED = 125  # for run and exec, as Docker and Podman: the runtime failed, not the container
COMMAND_FAILED = 1
NOBODY_READS = 128 + signal.SIGPIPE


def _verb(arguments: list[str]) -> str:
    """The first word that is no global option, nor the value of one; `container run` is run."""
    words = iter(arguments)
    for word in words:
        if word in ("--config", "--kata-config"):
            next(words, None)
        elif not word.startswith("-") and word != "container":
            return word
    return ""


def load_command(*verbs: str) -> click.Group:
    """The program, with the modules of these verbs loaded; click loads others when it needs them."""
    for verb in verbs:
        if verb in VERBS:
            kata_runtime.load(verb)
    return kata_runtime


def call(command: click.Command, words: list[str] | None = None, obj: object = None) -> int:
    """Carry out `words`, by default our own, and return the exit status. Raises what explain() takes.

    Not by click's main(): that turns errors into exits of its own, a broken pipe for one, whichever it was.
    """
    try:
        with command.make_context("kata-runtime", list(sys.argv[1:] if words is None else words), obj=obj) as context:
            result = command.invoke(context)
    except click.exceptions.Exit as exc:  # --help, --version
        return exc.exit_code
    return result if isinstance(result, int) else 0


def explain(error: BaseException, verb: str, *, bare: bool = False) -> int:
    """Say on standard error what went wrong; returns the exit status. `bare`: called with no words at all."""
    status = RUNTIME_FAILED if verb in ("run", "exec") else COMMAND_FAILED
    match error:
        case click.ClickException():
            # click prints usage and message; the status is ours. Called with nothing at all it printed its help.
            error.show()
            return 0 if bare else status
        case KatapodError():
            print_error(error)
            return error.exit_code if verb in ("run", "exec") else COMMAND_FAILED
        case ExceptionGroup():
            for one in error.exceptions:
                explain(one, verb)
            return status
        case KeyboardInterrupt():
            print("\nkata-runtime: interrupted", file=sys.stderr)  # on a line of its own, after the terminal's ^C
            return 130
        case BrokenPipeError() if _is_unread():
            return NOBODY_READS
        case OSError():
            print_error(error)
            return status
    # a bug of ours: say so, and keep the trace for who can read it
    import logging

    logging.getLogger(__name__).debug("the trace of the error below", exc_info=error)
    print(f"kata-runtime: internal error: {type(error).__name__}: {error}", file=sys.stderr)
    print("  hint: please report it with the output of: kata-runtime --debug ...", file=sys.stderr)
    return status


def flush_output(code: int) -> int:
    """Write out what stdout holds; returns `code`, or that of SIGPIPE if nobody reads it."""
    try:
        sys.stdout.flush()
    except OSError as exc:
        # the interpreter flushes once more at its end, and would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(exc, BrokenPipeError):
            return NOBODY_READS
        if not code:  # or the cause has been told
            print_error(KatapodError(f"cannot write the output: {exc.strerror}"))
        return code or COMMAND_FAILED
    return code


def _is_unread() -> bool:
    """Whether nobody reads our output, or our errors, any more. A socket elsewhere may break as well."""
    poll = select.poll()
    for fd in (1, 2):
        poll.register(fd, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def main() -> NoReturn:
    guard_output()
    verb = _verb(sys.argv[1:])
    try:
        start_tracing()
        if instruction := os.environ.get("_KATA_RUNTIME_COMPLETE"):
            from katapod.cli.completion import complete

            code = complete(kata_runtime, instruction)
        else:
            code = _carry_out(verb)
    except Exception as exc:
        code = explain(exc, verb, bare=len(sys.argv) == 1)
    except KeyboardInterrupt as exc:
        code = explain(exc, verb)
    gc.freeze()  # at its end the interpreter would look through all modules once more: 4 ms
    sys.exit(flush_output(code))


def _carry_out(verb: str) -> int:
    with span("load the command"):
        command = load_command(verb)
    if verb != "run":  # which has more to load, says itself when it has, and has handlers of its own
        is_loaded()
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return call(command)
