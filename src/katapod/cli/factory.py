"""`kata-runtime factory`: templates of virtual machines, which containers start from (init, status, destroy).

The verbs and their sentences are upstream's. Its second way to have machines ready, VMCache, is another room's:
a verb here asks for the mode first.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from katapod.cli.command import flag, group, option
from katapod.cli.interrupt import interruptible
from katapod.cli.progress import waiting
from katapod.cli.settings import Globals, need_root
from katapod.cli.tables import Column, print_table, shown_age, shown_size
from katapod.model.errors import UsageError

if TYPE_CHECKING:
    from katapod.model.config import Config
    from katapod.sandbox.template_store import TemplateInfo
    from katapod.vmm.template import TemplatePlan

__all__ = ["factory"]


@group()
def factory() -> None:
    """Templates: guests that have booted once, and of which containers get clones."""


@factory.command("init", short_help="Make the template that containers start from.")
@option("--accel", metavar="auto|kvm|tcg", help="Accelerator of the template; default: the configuration's.")
@click.pass_obj
def init(settings: Globals, accel: str) -> int:
    """Make the template of containers without limits, unless it is there and fresh.

    There is no need to: the first container that wants a template makes it. This spares it the wait.
    With vm_cache_number above 0, keep so many machines ready for the next containers, until SIGTERM or Ctrl-C.
    """
    need_root("factory init")
    if accel not in ("", "auto", "kvm", "tcg"):
        raise UsageError(f"cannot use --accel {accel!r}: it is none of auto, kvm, tcg")
    config = settings.load_config()
    if config.factory.vm_cache_number > 0:
        from katapod.cli.pool import serve_pool

        if accel:
            raise UsageError("cannot use --accel with vm_cache_number: the machines are the configuration's")
        return serve_pool(settings, config)
    if not config.factory.enable_template:
        print("vm factory or VMCache is not enabled")
        return 0
    return interruptible(_make_template(settings, config, accel))


async def _make_template(settings: Globals, config: "Config", accel: str) -> int:
    """Raises KatapodError, TemplateBroken, NoSpace."""
    from katapod.host.facts import collect_host_facts
    from katapod.sandbox.planning import default_template
    from katapod.sandbox.proof import choose_accelerator, wanted_accelerator
    from katapod.sandbox.template_build import prepare_template

    facts = collect_host_facts()
    with waiting("booting a guest and saving it as a template"):
        with tempfile.TemporaryDirectory(prefix="katapod-proof-") as scratch:
            wanted, proof_file = wanted_accelerator(config, accel), settings.layout.proof_file
            verdict = await choose_accelerator(wanted, config, facts, proof_file, Path(scratch))
        plan = default_template(config, facts, verdict.accelerator, verdict.remedy)
        assert plan is not None  # load_config has seen that its files are there
        await prepare_template(plan)
    if verdict.fresh:
        print(f"kata-runtime: {verdict.describe()}", file=sys.stderr)
    print("vm factory initialized")
    return 0


@factory.command("status", short_help="Show whether there are templates, and which.")
@flag("--json", "as_json", help="Print JSON for programs.")
@click.pass_obj
def status(settings: Globals, as_json: bool) -> None:
    """Show whether containers start from a template, and all templates that there are.

    STATE: `ready` and `worn` are those of containers without limits, with this configuration; a worn one is made
    anew at its next use. `other` are those of other configurations, or of a former guest image; they go when
    nobody has used them for long.
    """
    need_root("factory status")
    from katapod.sandbox.template_store import list_templates

    config = settings.load_config(need_files=False)
    templates = list_templates(Path(config.factory.template_path))
    plans = {plan.key: plan for plan in _default_plans(settings, config)}
    rows = [_describe(info, plans.get(info.key)) for info in templates]
    if not config.factory.enable_template:
        word, sentence = "disabled", "vm factory not enabled"
    elif any(row["state"] != "other" for row in rows):
        word, sentence = "on", "vm factory is on"
    else:
        word, sentence = "off", "vm factory is off"
    if as_json:
        import json

        from katapod.cli.pool import pool_status

        print(json.dumps({"factory": word, "templates": rows, "cache": pool_status(config)}, indent=2))
        return
    if config.factory.vm_cache_number > 0:
        from katapod.cli.pool import print_pool

        print_pool(config)
    print(sentence)
    if rows:
        now = time.time()
        columns = [
            Column("KEY", lambda row: row["key"]),
            Column("STATE", lambda row: row["state"]),
            Column("AGE", lambda row: shown_age(now - row["created"])),
            Column("USES", lambda row: str(row["uses"])),
            Column("LAST USED", lambda row: f"{shown_age(now - row['last_used'])} ago" if row["uses"] else "never"),
            Column("MEMORY", lambda row: f"{row['memory_mib']} MiB"),
            Column("ON DISK", lambda row: shown_size(row["size_bytes"])),
        ]
        print_table(columns, rows)


def _default_plans(settings: Globals, config: "Config") -> "list[TemplatePlan]":
    """Of both accelerators, as far as is known without a boot: to find out which one `auto` is may take one."""
    from katapod.host.facts import collect_host_facts
    from katapod.sandbox.planning import default_template
    from katapod.sandbox.proof import kept_verdict
    from katapod.vmm.spec import NO_REMEDY, Accelerator

    facts = collect_host_facts()
    kept = kept_verdict(config, facts, settings.layout.proof_file)
    remedy = kept.remedy if kept is not None else NO_REMEDY
    plans = [
        default_template(config, facts, Accelerator.KVM, remedy),
        default_template(config, facts, Accelerator.TCG),
    ]
    return [plan for plan in plans if plan is not None]


def _describe(info: "TemplateInfo", plan: "TemplatePlan | None") -> dict[str, Any]:
    """One template, with the names of --json."""
    state = (
        "other"
        if plan is None
        else "worn"
        if plan.limits.reached(time.time() - info.created_at, info.uses)
        else "ready"
    )
    return {
        "key": info.key,
        "state": state,
        "created": info.created_at,
        "last_used": info.last_used_at,
        "uses": info.uses,
        "memory_mib": info.memory_mib,
        "size_bytes": info.size_bytes,
    }


@factory.command("destroy", short_help="Remove all templates.")
@click.pass_obj
def destroy(settings: Globals) -> None:
    """Remove all templates, after the server of the pool and its idle machines have ended, if there is one.

    Running containers are not touched; the next one makes its template anew.
    """
    need_root("factory destroy")
    from katapod.sandbox.template_store import destroy_templates

    config = settings.load_config(need_files=False)
    if config.factory.vm_cache_number > 0:
        from katapod.cli.pool import end_pool

        end_pool(config)
    count = destroy_templates(Path(config.factory.template_path))
    print("vm factory destroyed")
    print(f"{count} template{'' if count == 1 else 's'} removed")
