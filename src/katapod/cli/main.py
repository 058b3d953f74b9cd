"""`kata-runtime`: the program and the one place that turns errors into messages and exit codes."""

import importlib
import logging
import os
import select
import signal
import sys
from typing import Annotated, NoReturn

import click
import typer

from katapod import __version__
from katapod.cli import is_loaded
from katapod.cli.plain_output import guard_output
from katapod.cli.settings import Globals, print_error
from katapod.cli.text_flags import check_text
from katapod.host.trace import span, start_tracing
from katapod.model.errors import KatapodError

__all__ = ["call", "explain", "flush_output", "load_command", "main"]

log = logging.getLogger(__name__)

RUNTIME_FAILED = 125  # for run and exec, as Docker and Podman: the runtime failed, not the container
COMMAND_FAILED = 1
NOBODY_READS = 128 + signal.SIGPIPE

# Verb to the module that registers it. Only the module of the verb that is called is loaded, all of them
# for help, completion and words that are no verb: a start costs 0.1 s less than with all.
VERBS = {
    "run": "run",
    "exec": "execute",
    "list": "containers",
    "ps": "containers",
    "kill": "containers",
    "pause": "containers",
    "resume": "containers",
    "stats": "containers",
    "delete": "containers",
    "rm": "containers",
    "logs": "logs",
    "image": "images",
    "factory": "factory",
    "network": "network",
    "overhead": "overhead",
    "inspect": "inspect",
    "check": "check",
    "kata-check": "check",
    "collect-data": "collect",
    "metrics": "management",
    "iptables": "management",
    "direct-volume": "direct_volumes",
    "config": "config",
    "env": "environment",
    "kata-env": "environment",
}

app = typer.Typer(
    name="kata-runtime",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run containers, each in a small virtual machine with a guest kernel of its own.\n\n"
    "First steps: kata-runtime run --rm busybox uname -r",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


def _print_paths(wanted: bool) -> None:
    if wanted:
        from katapod.model.config import CONFIG_PATHS

        print("\n".join(CONFIG_PATHS))
        raise typer.Exit


@app.callback()
def global_options(
    context: typer.Context,
    config: Annotated[
        str, typer.Option("--config", "--kata-config", metavar="FILE", help="Configuration file to use.")
    ] = "",
    debug: Annotated[bool, typer.Option("--debug", help="Say on standard error what is done.")] = False,
    _paths: Annotated[
        bool,
        typer.Option(
            "--show-default-config-paths",
            "--kata-show-default-config-paths",
            callback=_print_paths,
            is_eager=True,
            help="Print where the configuration is looked for, and exit.",
        ),
    ] = False,
    _version: Annotated[
        bool, typer.Option("--version", "-v", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    context.obj = Globals(config_file=config, debug=debug, keep_run=context.obj)
    context.obj.set_up_logging()


@app.command(help="Print the version.")
def version() -> None:
    from katapod.about import OCI_VERSION, commit

    print(f"kata-runtime  : {__version__}\n   commit   : {commit()}\n   OCI specs: {OCI_VERSION}")


def _verb(arguments: list[str]) -> str:
    """The first word that is no global option, nor the value of one."""
    words = iter(arguments)
    for word in words:
        if word in ("--config", "--kata-config"):
            next(words, None)
        elif not word.startswith("-"):
            return word
    return ""


def _load_verbs(verb: str) -> None:
    modules = [VERBS[verb]] if verb in VERBS else dict.fromkeys(VERBS.values())
    for name in modules:
        importlib.import_module(f"katapod.cli.{name}").register(app)


def load_command(verb: str) -> click.Command:
    """The program, with all of its verbs unless `verb` is one of them."""
    _load_verbs(verb)
    command = typer.main.get_command(app)
    check_text(command)
    return command


def call(command: click.Command, words: list[str] | None = None, obj: object = None) -> int:
    """Carry out `words`, by default our own, and return the exit status. Raises what explain() takes."""
    try:
        result = command.main(words, prog_name="kata-runtime", standalone_mode=False, obj=obj)
    except SystemExit as exc:
        if isinstance(exc.__context__, BrokenPipeError):  # of which, whichever pipe it was, click makes an exit with 1
            raise exc.__context__ from None
        raise
    return result if isinstance(result, int) else 0


def explain(error: BaseException, verb: str, *, bare: bool = False) -> int:
    """Say on standard error what went wrong; returns the exit status. `bare`: called with no words at all."""
    status = RUNTIME_FAILED if verb in ("run", "exec") else COMMAND_FAILED
    match error:
        case click.ClickException():
            # click prints usage and message; the status is ours. Called with nothing at all it printed its help.
            error.show()
            return 0 if bare else status
        case typer.Exit():
            return error.exit_code
        case KatapodError():
            print_error(error)
            return error.exit_code if verb in ("run", "exec") else COMMAND_FAILED
        case ExceptionGroup():
            for one in error.exceptions:
                explain(one, verb)
            return status
        case KeyboardInterrupt() | click.Abort():
            print("kata-runtime: interrupted", file=sys.stderr)
            return 130
        case BrokenPipeError() if _is_unread():
            return NOBODY_READS
        case OSError():
            print_error(error)
            return status
    # a bug of ours: say so, and keep the trace for who can read it
    log.debug("the trace of the error below", exc_info=error)
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
        with span("load the command"):
            command = load_command("" if "_KATA_RUNTIME_COMPLETE" in os.environ else verb)
        if verb != "run":  # which has more to load, says itself when it has, and has handlers of its own
            is_loaded()
            if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
                signal.signal(signal.SIGINT, signal.default_int_handler)
        code = call(command)
    except Exception as exc:
        code = explain(exc, verb, bare=len(sys.argv) == 1)
    except KeyboardInterrupt as exc:
        code = explain(exc, verb)
    sys.exit(flush_output(code))
