"""`kata-runtime config`: show the effective values, check a file."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from katapod.cli.settings import Globals
from katapod.model.errors import ConfigError, KatapodError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Show or check the configuration.")
    group.command("show", help="Print the effective values, and where each comes from.")(show)
    group.command("check", help="Check a file, and its config.d: all that is wrong in one run.")(check)
    app.add_typer(group, name="config")


def show(
    context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="As JSON, not as TOML.")] = False
) -> None:
    from katapod.model.config import load_config
    from katapod.model.config_text import config_table, render_config

    settings: Globals = context.obj
    parsed = load_config(Path(settings.config_file) if settings.config_file else None)
    for problem in parsed.problems:
        print(f"kata-runtime: {problem.severity}: {problem}", file=sys.stderr)
    if not as_json:
        sys.stdout.write(render_config(parsed))
        return
    import json

    print(json.dumps({"source": parsed.source, "config": config_table(parsed)}, indent=2))


def check(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="Default: the one that is in use.")] = "",
) -> int:
    """Exit status 0: it can be used, perhaps with warnings."""
    from katapod.model.config import BUILT_IN, CONFIG_PATHS, check_paths, judge_config, parse_config, read_config

    settings: Globals = context.obj
    chosen = file or settings.config_file or next((path for path in CONFIG_PATHS if os.path.exists(path)), "")
    if not chosen:
        print(f"no configuration file, {BUILT_IN} are used")
        return 0
    content = read_config(Path(chosen))
    judged = judge_config(*content)
    for problem in judged.problems:
        print(f"{problem.severity}: {problem}")
    if any(problem.stops for problem in judged.problems):
        return 1
    try:
        check_paths(parse_config(*content), os.path.exists)
    except (ConfigError, KatapodError) as error:
        print(f"error: {error}" + (f"; {error.hint}" if error.hint else ""))
        return 1
    print(f"{chosen} is good" + (", with the warnings above" if judged.problems else ""))
    return 0
