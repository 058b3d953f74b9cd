"""`kata-runtime update`: other limits for containers that run."""

import click

from katapod.cli.command import option, verb
from katapod.cli.containers import each, the_names, with_supervisor
from katapod.cli.declared import declared, refused
from katapod.cli.settings import Globals, need_root
from katapod.model.errors import UsageError

__all__ = ["update"]


@verb("update")
@the_names
@option("-m", "--memory", metavar="SIZE", help="Memory limit, at most what the VM has.")
@option("--memory-reservation", metavar="SIZE", help="Memory that is kept from being reclaimed in the VM.")
@option("--cpus", metavar="N", help="CPU limit; the VM has as many vCPUs as it started with.")
@option("--memory-swap", metavar="SIZE", help="Taken if it is the memory limit, or -1: a VM has no swap.")
@option("--pids-limit", metavar="N", help="Maximum number of processes; -1: none.")
@declared(
    (
        refused(
            "--restart",
            cause="nothing here starts a container again",
            way="a systemd unit with Restart=",
            meant=("", "no"),
        ),
        refused("--cpu-shares", cause="weights rank containers of one kernel", way="--cpus N", meant=("", "0", "1024")),
        refused("--cpuset-cpus", cause="the VM runs already", way="taskset -p, for the processes of inspect"),
        refused("--blkio-weight", cause="weights rank containers of one kernel", way="ionice -p", meant=("", "0")),
    )
)
@click.pass_obj
def update(
    settings: Globals,
    names: tuple[str, ...],
    memory: str,
    memory_reservation: str,
    cpus: str,
    memory_swap: str,
    pids_limit: str,
) -> int:
    """Change the limits of running containers, in the VM that they have, and print their names."""
    need_root("update")
    from katapod.model import oci
    from katapod.model.flags import check_swap, parse_cpus, parse_memory, parse_pids_limit
    from katapod.plan.container_spec import CPU_PERIOD_US
    from katapod.sandbox.client import ControlClient

    if not (memory or memory_reservation or cpus or pids_limit):
        raise UsageError("cannot update: no limit is given", hint="for example: kata-runtime update -m 256m NAME")
    limit = parse_memory(memory) if memory else None
    check_swap(memory_swap, limit)
    reservation = parse_memory(memory_reservation, "--memory-reservation") if memory_reservation else None
    number = parse_cpus(cpus) if cpus else None
    pids = parse_pids_limit(pids_limit) if pids_limit else None
    resources = oci.Resources(
        memory=oci.Memory(limit=limit or -1 if memory else None, swap=limit, reservation=reservation)
        if memory or memory_reservation
        else None,
        cpu=oci.Cpu(quota=round(number * CPU_PERIOD_US) if number else -1, period=CPU_PERIOD_US) if cpus else None,
        pids=oci.Pids(limit=pids if pids is not None else -1) if pids_limit else None,
    )

    async def one(client: ControlClient, name: str) -> None:
        await client.update(name, resources)
        print(name, flush=True)

    return each(names, with_supervisor(settings, one))
