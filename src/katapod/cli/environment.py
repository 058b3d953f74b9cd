"""`kata-runtime env`: what this program, its configuration and this host are."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from katapod.cli.command import HOST_PATH, flag, option, verb
from katapod.cli.settings import Globals
from katapod.model.errors import UsageError

if TYPE_CHECKING:
    from katapod.model.config import Config
    from katapod.vmm.protocol import Vmm

__all__ = ["env"]


@verb("env")
@flag("--json", "as_json", help="Print JSON instead of TOML.")
@option("-f", "--file", metavar="FILE", type=HOST_PATH, help="Write to FILE.")
@click.pass_obj
def env(settings: Globals, as_json: bool, file: str) -> None:
    """Print versions, paths and settings: of this program, QEMU, the guest and the host."""
    from katapod.observe.environment import collect_environment, render_toml
    from katapod.sandbox.planning import usual_kernel_params

    parsed = settings.parse_config()
    vmm = _likely_vmm(settings, parsed.config)
    tree = collect_environment(parsed, usual_kernel_params(parsed.config, vmm), vmm.program(parsed.config))
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


def _likely_vmm(settings: Globals, config: "Config") -> "Vmm":
    """That of a container without wishes; QEMU as long as no start has found it out."""
    from katapod.host.facts import collect_host_facts
    from katapod.sandbox.ladder import needs_of_config
    from katapod.sandbox.proof import likely_choice, wanted_accelerator
    from katapod.sandbox.vmms import DEFAULT_VMM, vmm_of
    from katapod.vmm.spec import Accelerator

    wanted = wanted_accelerator(config)
    if wanted != "auto":
        return vmm_of(Accelerator(wanted))
    try:
        likely = likely_choice(config, collect_host_facts(), settings.layout.proof_file, needs_of_config(config))
    except OSError:  # no guest image yet
        return DEFAULT_VMM
    return vmm_of(likely.accelerator) if likely is not None else DEFAULT_VMM
