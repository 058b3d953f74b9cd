"""`create`: a container on record with all that it needs of the host but a VM, for `start` to run."""

import time

from msgspec.structs import replace

from katapod.host.event_log import note_event
from katapod.host.facts import collect_host_facts
from katapod.host.state import write_atomically
from katapod.model import oci
from katapod.model.record import State
from katapod.sandbox.deletion import delete_sandbox
from katapod.sandbox.opening import claimed
from katapod.sandbox.recovery import reap_dead
from katapod.sandbox.start_record import new_record
from katapod.supervisor.container_source import prepare_container
from katapod.supervisor.kept import keep_planned
from katapod.supervisor.named_volumes import with_named_volumes
from katapod.supervisor.run_context import RunContext
from katapod.supervisor.run_extras import write_cid_file
from katapod.supervisor.run_request import RunRequest

__all__ = ["create_container"]


async def create_container(context: RunContext, request: RunRequest) -> None:
    """Have the container on record, its image held and its volumes made. On failure, or when cancelled, nothing of it
    is left but volumes with names. `request` is not of a bundle.

    Raises AlreadyExists, ConfigError, and as prepare_container.
    """
    store = context.states()
    config = context.load_config(request.options.annotations or None)
    if request.replace:
        await delete_sandbox(store, request.container_id, force=True)
    await reap_dead(store)
    record = new_record(
        request.container_id,
        collect_host_facts(),
        auto_remove=request.remove,
        labels=request.labels,
        restart=str(request.restart),
    )
    async with claimed(store, record):
        request = with_named_volumes(context.layout, request)
        plan = await prepare_container(context, config, request, None)
        keep_planned(context.layout, request, plan)
        made = replace(
            record,
            state=State.CREATED,
            lasting=True,
            supervisor_pid=0,
            created_at=time.time(),
            containers=(replace(plan.record(), state=State.CREATED),),
        )
        if request.cid_file is not None:
            write_cid_file(request.cid_file, request.container_id)
        write_atomically(store.layout.sandbox(record.sandbox_id).spec(request.container_id), oci.encode_spec(plan.spec))
        store.keep(made)
        note_event(store.layout, "create", made)
        store.write(made)  # the last step: from now on it is a container
