"""`kata-runtime config`: show the effective values, check a file."""

import os
import sys

import click

from katapod.cli.command import HOST_PATH, argument, flag, group
from katapod.cli.settings import Globals
from katapod.model.errors import ConfigError, KatapodError

__all__ = ["config"]


@group()
def config() -> None:
    """Show or check the configuration."""


@config.command()
@flag("--json", "as_json", help="Print JSON instead of TOML.")
@click.pass_obj
def show(settings: Globals, as_json: bool) -> None:
    """Print the effective values and where each comes from."""
    from katapod.model.config_text import config_table, render_config

    parsed = settings.parse_config()
    if not as_json:
        sys.stdout.write(render_config(parsed))
        return
    import json

    print(json.dumps({"source": parsed.source, "config": config_table(parsed)}, indent=2))


@config.command()
@argument("file", default="", metavar="[FILE]", type=HOST_PATH, help="Default: the one in use.")
@click.pass_obj
def check(settings: Globals, file: str) -> int:
    """Check a file and its config.d, and report everything that is wrong."""
    from pathlib import Path

    from katapod.model.config import BUILT_IN, CONFIG_PATHS, check_paths, judge_config, parse_config, read_config

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
