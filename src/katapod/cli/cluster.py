"""`kata-runtime cluster status`: what the operator says of a cluster's nodes, by kubectl and its settings."""

import asyncio
import os
from typing import Any

import click
import msgspec

from katapod.cli.command import flag, group
from katapod.cli.settings import Globals
from katapod.cli.tables import Column, print_table
from katapod.model.errors import KatapodError, NotFound
from katapod.model.kataconfig import Condition, Status
from katapod.model.plain import plain

__all__ = ["cluster"]

RESOURCE = "kataconfigs.kataconfiguration.openshift.io"
LIMIT_S = 60.0
BEHIND = "; the machine-config operator has not answered the last change yet"


class Meta(msgspec.Struct, frozen=True):
    name: str


class KataConfig(msgspec.Struct, frozen=True):
    metadata: Meta
    status: Status = Status()


class KataConfigs(msgspec.Struct, frozen=True):
    items: tuple[KataConfig, ...]


@group()
def cluster() -> None:
    """See Katapod on a Kubernetes cluster."""


@cluster.command("status", short_help="Show the state of nodes.")
@flag("--json", "as_json", help="Print JSON.")
@click.pass_obj
def status(_: Globals, as_json: bool) -> None:
    """Show each KataConfig with its conditions, RuntimeClasses and nodes, as kubectl gets them."""
    found = asyncio.run(_ask())
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found.items)).decode())
        return
    if not found.items:
        raise NotFound("this cluster has no KataConfig", hint="docs/how-to/operator.md has an example")
    for index, one in enumerate(found.items):
        if index:
            print()
        _show(one)


async def _ask() -> KataConfigs:
    from katapod.host.process import find_program, run

    kubectl = find_program("kubectl", package="kubernetes-client")
    # its settings, and those of the programs that it gets credentials from
    done = await run([kubectl, "get", RESOURCE, "-o", "json"], timeout_s=LIMIT_S, only_env=os.environ, check=False)
    if done.returncode:
        said = done.stderr.strip()
        missing = "doesn't have a resource type" in said or "could not find the requested resource" in said
        hint = "the operator is not installed: docs/how-to/operator.md" if missing else ""
        raise KatapodError(f"cannot ask the cluster: kubectl: {said}", hint=hint)
    try:
        return msgspec.json.decode(done.stdout, type=KataConfigs)
    except msgspec.MsgspecError as exc:
        raise KatapodError(f"cannot read what kubectl says of {RESOURCE}: {exc}") from exc


def _show(one: KataConfig) -> None:
    status = one.status
    print(f"{plain(one.metadata.name)}: {plain(status.summary) or 'no operator has seen it yet'}")
    if status.backend:
        print(f"Back end: {plain(status.backend)}{BEHIND if status.waiting_for_mco_to_start else ''}")
    if status.runtime_classes:
        print(f"RuntimeClasses: {plain(', '.join(status.runtime_classes))}")
    if status.conditions:
        print()
        print_table(
            [
                Column("CONDITION", lambda row: row.type),
                Column("STATUS", lambda row: row.status),
                Column("SINCE", lambda row: row.last_transition_time),
                Column("WHY", _why),
            ],
            status.conditions,
        )
    if status.nodes:
        print()
        print_table(
            [
                Column("NODE", lambda row: row.name),
                Column("PHASE", lambda row: row.phase),
                Column("BY", lambda row: row.accelerator or "-"),
                Column("VERSION", lambda row: row.target or "-"),
                Column("PROOF", _proof),
                Column("MESSAGE", lambda row: row.message),
            ],
            status.nodes,
        )
        if status.nodes_omitted:
            print(f"and {status.nodes_omitted} nodes more; kubectl get nodes --label-columns katapod.io/runtime")


def _why(row: Condition) -> str:
    return ": ".join(filter(None, (row.reason, row.message)))


def _proof(row: Any) -> str:
    return f"{row.proof_seconds:.1f} s" if row.proof_seconds else "-"
