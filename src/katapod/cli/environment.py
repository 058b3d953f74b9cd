"""`kata-runtime env`: what this program, its configuration and this host are."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from katapod.cli.settings import Globals
from katapod.model.errors import UsageError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command(
        "env",
        short_help="Print versions, paths and settings.",
        help="Print versions, paths and settings: of this program, QEMU, the guest and the host.",
    )(env)
    app.command("kata-env", hidden=True)(env)


def env(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, not as TOML.")] = False,
    file: Annotated[str, typer.Option("-f", "--file", metavar="FILE", help="Write to FILE.")] = "",
) -> None:
    from katapod.host.environment import collect_environment, render_toml
    from katapod.model.config import load_config
    from katapod.sandbox.planning import usual_kernel_params

    settings: Globals = context.obj
    parsed = load_config(Path(settings.config_file) if settings.config_file else None)
    for problem in parsed.problems:
        print(f"kata-runtime: {problem.severity}: {problem}", file=sys.stderr)
    tree = collect_environment(parsed, usual_kernel_params(parsed.config))
    if as_json:
        import json

        text = json.dumps(tree, indent=2) + "\n"
    else:
        text = render_toml(tree)
    if not file:
        sys.stdout.write(text)
        return
    try:
        Path(file).write_text(text)
    except OSError as exc:
        raise UsageError(f"cannot write {file}: {exc.strerror}") from exc
