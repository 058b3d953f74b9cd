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
from katapod.model.flags import parse_accelerator

if TYPE_CHECKING:
    from katapod.model.config import Config
    from katapod.sandbox.template_store import TemplateInfo
    from katapod.vmm.template import TemplatePlan

__all__ = ["factory"]


@group()
def factory() -> None:
    """Manage templates: guests that have booted once, of which each container gets a clone."""


@factory.command("init", short_help="Make the template that containers start from.")
@option("--accel", metavar="auto|kvm|uml|tcg", help="Accelerator of the template; default: the configuration's.")
@click.pass_obj
def init(settings: Globals, accel: str) -> int:
    """Make the template for containers without limits, unless there is a fresh one.

    This is optional: the first container that needs a template makes it, but has to wait for it. Those under User-mode
    Linux need none: with accelerator = "auto" it is for those that ask for what that lacks. With vm_cache_number
    above 0, keeps that many machines ready for the next containers until SIGTERM or Ctrl-C.
    """
    need_root("factory init")
    accel = parse_accelerator(accel)
    config = settings.load_config()
    if config.factory.vm_cache_number > 0:
        from katapod.cli.pool import serve_pool

        if accel:
            raise UsageError(
                "cannot use --accel with vm_cache_number: the machines use the configuration's accelerator"
            )
        return serve_pool(settings, config)
    if not config.factory.enable_template:
        print("vm factory or VMCache is not enabled")
        return 0
    return interruptible(_make_template(settings, config, accel))


async def _make_template(settings: Globals, config: "Config", accel: str) -> int:
    """Raises KatapodError, TemplateBroken, NoSpace."""
    from msgspec import structs

    from katapod.host.facts import collect_host_facts
    from katapod.sandbox.ladder import needs_of_config
    from katapod.sandbox.planning import default_template
    from katapod.sandbox.proof import choose_accelerator, wanted_accelerator
    from katapod.sandbox.template_build import prepare_template

    facts = collect_host_facts()
    with waiting("booting a guest and saving it as a template"):
        with tempfile.TemporaryDirectory(prefix="katapod-proof-") as scratch:
            wanted, proof_file = wanted_accelerator(config, accel), settings.layout.proof_file
            needs = structs.replace(needs_of_config(config), template=True)
            choice = await choose_accelerator(wanted, config, facts, proof_file, Path(scratch), needs=needs)
        plan = default_template(config, facts, choice.accelerator, choice.remedy)
        assert plan is not None, "load_config has seen that its files are there"
        await prepare_template(plan)
    if choice.fresh:
        print(f"kata-runtime: {choice.describe()}", file=sys.stderr)
    print("vm factory initialized")
    return 0


@factory.command("status", short_help="Show the templates.")
@flag("--json", "as_json", help="Print JSON.")
@click.pass_obj
def status(settings: Globals, as_json: bool) -> None:
    """Show whether containers start from a template, and list all templates.

    STATE is `ready` or `worn` for the templates of containers without limits, with this configuration; a worn one is
    made again at its next use. It is `other` for those of other configurations or an older guest image; they are
    removed when they have not been used for long. With User-mode Linux no template is needed.
    """
    need_root("factory status")
    from katapod.sandbox.proof import wanted_accelerator
    from katapod.sandbox.template_store import list_templates
    from katapod.vmm.proof import RUNGS
    from katapod.vmm.spec import Accelerator

    config = settings.load_config(need_files=False)
    templates = list_templates(Path(config.factory.template_path))
    plans = {plan.key: plan for plan in _default_plans(settings, config)}
    rows = [_describe(info, plans.get(info.key)) for info in templates]
    if wanted_accelerator(config) == Accelerator.UML.value:
        word, sentence = "not needed", _not_needed(RUNGS[Accelerator.UML])
    elif not config.factory.enable_template:
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

        serves = print_pool(config)
        if serves and word == "not needed":
            number = config.factory.vm_cache_number
            sentence += f": the pool keeps {number} machine{'' if number == 1 else 's'} ready"
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


def _not_needed(vmm: str) -> str:
    return f"no template is needed with {vmm}"


def _default_plans(settings: Globals, config: "Config") -> "list[TemplatePlan]":
    """Of both accelerators, as far as is known without a boot: to find out which one `auto` is may take one."""
    from katapod.host.facts import collect_host_facts
    from katapod.sandbox.planning import default_template
    from katapod.sandbox.proof import kept_choice
    from katapod.vmm.spec import NO_REMEDY, Accelerator

    facts = collect_host_facts()
    kept = kept_choice(config, facts, settings.layout.proof_file)
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
    """Stop the server of the pool and its idle machines, if there is one, and remove all templates.

    Running containers are not affected; the next one makes its template again.
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
