"""`kata-runtime`: the program and the one place that turns errors into messages and exit codes."""

import importlib
import logging
import os
import signal
import sys
from typing import Annotated, NoReturn

import click
import typer

from katapod import __version__
from katapod.cli.settings import Globals, print_error
from katapod.host.trace import span, start_tracing
from katapod.model.errors import KatapodError

__all__ = ["main"]

log = logging.getLogger(__name__)

OCI_VERSION = "1.0.2"
RUNTIME_FAILED = 125  # for run and exec, as Docker and Podman: the runtime failed, not the container
COMMAND_FAILED = 1

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
    context.obj = Globals(config_file=config, debug=debug)
    context.obj.set_up_logging()


@app.command(help="Print the version.")
def version() -> None:
    print(f"kata-runtime  : {__version__}\n   commit   : unknown\n   OCI specs: {OCI_VERSION}")


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


def main() -> NoReturn:
    verb = _verb(sys.argv[1:])
    status = RUNTIME_FAILED if verb in ("run", "exec") else COMMAND_FAILED
    try:
        start_tracing()
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with span("load the command"):
            _load_verbs("" if "_KATA_RUNTIME_COMPLETE" in os.environ else verb)
            command = typer.main.get_command(app)
        result = command.main(prog_name="kata-runtime", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except click.ClickException as exc:
        # click prints usage and message; the status is ours. Called with nothing at all it printed its help.
        exc.show()
        code = status if len(sys.argv) > 1 else 0
    except typer.Exit as exc:
        code = exc.exit_code
    except KatapodError as exc:
        print_error(exc)
        code = exc.exit_code if verb in ("run", "exec") else COMMAND_FAILED
    except ExceptionGroup as group:
        for error in group.exceptions:
            print_error(error)
        code = status
    except (KeyboardInterrupt, click.Abort):
        print("kata-runtime: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 141
    except OSError as exc:
        print_error(exc)
        code = status
    except Exception as exc:
        # a bug of ours: say so, and keep the trace for who can read it
        log.debug("the trace of the error below", exc_info=True)
        print(f"kata-runtime: internal error: {type(exc).__name__}: {exc}", file=sys.stderr)
        print("  hint: please report it with the output of: kata-runtime --debug ...", file=sys.stderr)
        code = status
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = 141
        # the interpreter flushes once more at its end, and would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
