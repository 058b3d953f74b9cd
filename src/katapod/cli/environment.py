"""`kata-runtime env`: what this program, its configuration and this host are."""

import sys
from pathlib import Path

import click

from katapod.cli.command import HOST_PATH, flag, option, verb
from katapod.cli.settings import Globals
from katapod.model.errors import UsageError

__all__ = ["env"]


@verb("env")
@flag("--json", "as_json", help="As JSON, not as TOML.")
@option("-f", "--file", metavar="FILE", type=HOST_PATH, help="Write to FILE.")
@click.pass_obj
def env(settings: Globals, as_json: bool, file: str) -> None:
    """Print versions, paths and settings: of this program, QEMU, the guest and the host."""
    from katapod.observe.environment import collect_environment, render_toml
    from katapod.sandbox.planning import usual_kernel_params

    parsed = settings.parse_config()
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
