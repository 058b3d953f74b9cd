"""A sandbox: a virtual machine that this program holds, for containers that come and go; and all that there are."""

import contextlib
from collections.abc import AsyncIterator
from typing import Unpack, cast

from katapod.api.container import Container, opened
from katapod.api.context import need_root, run_context, states
from katapod.api.info import SandboxInfo, sandbox_info
from katapod.api.options import (
    ContainerOptions,
    ImageSource,
    Joined,
    Options,
    SandboxOptions,
    container_request,
    hostname_of,
    network_of,
)
from katapod.model.flags import parse_accelerator
from katapod.model.ids import name_or_new, parse_container_name
from katapod.sandbox.deletion import delete_sandbox
from katapod.sandbox.listing import is_lost, list_sandboxes
from katapod.sandbox.lookup import find_sandbox
from katapod.sandbox.opening import open_sandbox
from katapod.sandbox.pod import Pod
from katapod.sandbox.request import SandboxRequest
from katapod.sandbox.runner import joined_container
from katapod.sandbox.task import watch_oom
from katapod.supervisor.container_source import prepare_container, with_network_files
from katapod.supervisor.named_volumes import with_named_volumes
from katapod.supervisor.run_context import RunContext
from katapod.supervisor.start import limits_of
from katapod.tasks import beside

__all__ = ["Sandbox"]


class Sandbox:
    """Made by `open`. One that has a single container is quicker by Container.create: its VM is made for that."""

    def __init__(self, pod: Pod, context: RunContext, joined: Joined) -> None:
        """For Katapod itself."""
        self._pod = pod
        self._context = context
        self._joined = joined

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, *, name: str = "", **options: Unpack[SandboxOptions]) -> AsyncIterator["Sandbox"]:
        """Start a virtual machine without containers. At the end of the block it is ended, and nothing of it is left.

        Raises UsageError, AlreadyExists, HostLacks, NoSpace, ConfigError, KatapodError.
        """
        sandbox_id = name_or_new(name)
        joined = Joined(sandbox_id, hostname_of(options, sandbox_id), network_of(options))
        context = run_context(options.get("config_file", ""))
        request = SandboxRequest(
            sandbox_id=sandbox_id,
            hostname=joined.hostname,
            network=joined.network,
            accelerator=parse_accelerator(options.get("accelerator", ""), "accelerator"),
            shares=False,  # what a container shares is plugged for it
            labels=dict(options.get("labels", {})),
        )
        need_root(f"open sandbox {sandbox_id}")
        pod = await open_sandbox(
            request, context.load_config(None), context.states(), servers=context.servers, tell=context.tell
        )
        try:
            async with beside(watch_oom(pod.sandbox, pod.containers), name="watch-oom"):
                yield cls(pod, context, joined)
        finally:
            await pod.close()

    @property
    def id(self) -> str:
        return self._pod.sandbox.sandbox_id

    def info(self) -> SandboxInfo:
        return sandbox_info(self._pod.sandbox.record)

    @contextlib.asynccontextmanager
    async def create(
        self, image: ImageSource, *command: str, name: str = "", **options: Unpack[ContainerOptions]
    ) -> AsyncIterator[Container]:
        """A container in this sandbox, ready to be started; the VM grows for its limits. At the end of the block it is
        ended and removed. Parameters and errors as for Container.create."""
        request = container_request(image, command, name, cast(Options, options), joins=self._joined)
        request = with_named_volumes(self._context.layout, request)
        plan = await prepare_container(self._context, self._pod.config, request, None)
        plan = with_network_files(self._context, request, plan, self._pod.sandbox.record.attachment)
        async with (
            joined_container(self._pod, plan, limits_of(request.options)) as made,
            opened(made) as container,
        ):
            yield container

    @classmethod
    async def list(cls) -> tuple[SandboxInfo, ...]:
        """All sandboxes of this host, running or stopped, newest first."""
        return tuple(sandbox_info(found.record, lost=found.lost) for found in list_sandboxes(states()))

    @classmethod
    async def find(cls, name: str) -> SandboxInfo:
        """One, by its name or id, the beginning of an id of 64 digits, or one of its containers. Raises UsageError,
        NotFound."""
        store = states()
        record = find_sandbox(store, name).record
        return sandbox_info(record, lost=is_lost(store, record))

    @classmethod
    async def delete(cls, name: str, *, force: bool = False) -> None:
        """Remove all that is left of one that has ended; with `force`, of one that runs: the process that holds it is
        ended then, whichever that is. Raises NotFound, InvalidState, KatapodError."""
        need_root(f"delete {name}")
        await delete_sandbox(states(), parse_container_name(name), force=force)
