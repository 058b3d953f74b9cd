"""The way from a request to a container that is created in a sandbox of its own, for whoever holds it."""

import contextlib
from collections.abc import AsyncIterator
from functools import partial

from msgspec import structs

from katapod.host.cpu_list import use_cpus
from katapod.host.direct_volumes import read_volume
from katapod.host.trace import span
from katapod.model import oci
from katapod.model.config import Config
from katapod.model.sizing import ContainerLimits
from katapod.plan.cgroup import path_without_engine
from katapod.plan.container_spec import ContainerOptions
from katapod.sandbox.block_devices import has_block_devices
from katapod.sandbox.bundle import read_bundle
from katapod.sandbox.container import Container, ContainerPlan
from katapod.sandbox.deletion import delete_sandbox
from katapod.sandbox.pool import ReadyMachine
from katapod.sandbox.recovery import rested
from katapod.sandbox.request import SandboxRequest, wants_32bit
from katapod.sandbox.runner import created_container
from katapod.supervisor.container_source import prepare_container, with_network_files
from katapod.supervisor.host_devices import disks_among
from katapod.supervisor.kept import keep_planned
from katapod.supervisor.named_volumes import drop_anonymous, with_named_volumes
from katapod.supervisor.run_context import RunContext
from katapod.supervisor.run_extras import remove_image, with_exposed_ports, write_cid_file
from katapod.supervisor.run_request import RunRequest

__all__ = ["created", "limits_of"]


@contextlib.asynccontextmanager
async def created(
    context: RunContext, request: RunRequest, ready: ReadyMachine | None = None
) -> AsyncIterator[Container]:
    """What `request` asks for, created and not started, in the machine `ready` if that fits; the sandbox ends with the
    block. Raises ConfigError, SpecError, and as prepare_container and created_container."""
    bundle_spec = _load_bundle(request) if request.bundle else None
    with span("load configuration"):
        config = context.load_config((bundle_spec or request.options).annotations or None)
    if request.cpus_allowed:
        use_cpus(request.cpus_allowed)
        ready = None  # its machine runs already, on others
    request = await with_exposed_ports(context, request, config.katapod.registries)
    request = with_named_volumes(context.layout, request)
    if request.replace:
        await delete_sandbox(context.states(), request.container_id, force=True)
    again = None
    if request.again:
        again = structs.replace(await rested(context.states(), request.container_id), restarts=request.restarts)
    wanted = structs.replace(_wanted(context, config, request, bundle_spec), again=again)

    async def prepare() -> ContainerPlan:
        with span("acquire image"):
            plan = await prepare_container(context, config, request, bundle_spec)
            if request.lasts:
                keep_planned(context.layout, request, plan)
            return plan

    try:
        async with created_container(
            wanted,
            config,
            context.states(),
            prepare,
            ready=ready,
            with_network=partial(with_network_files, context, request),
            servers=context.servers,
            tell=context.tell,
        ) as container:
            if request.cid_file is not None:
                write_cid_file(request.cid_file, request.container_id)
            yield container
    finally:
        if request.remove:
            drop_anonymous(context.layout, request)
    if request.remove_image:
        await remove_image(context, request)


def _wanted(context: RunContext, config: Config, request: RunRequest, bundle_spec: oci.Spec | None) -> SandboxRequest:
    volumes = oci.bind_sources(bundle_spec) if bundle_spec else _sources(request.options)
    return SandboxRequest(
        sandbox_id=request.container_id,
        hostname=(bundle_spec or request.options).hostname or request.container_id,
        limits=limits_of(request.options, bundle_spec),
        fixed=True,
        network=request.network,
        cgroups_path=_cgroups_path(config, request.container_id, bundle_spec),
        shm_size_bytes=request.options.shm_bytes,
        accelerator=request.accel,
        block_devices=(bundle_spec is not None and has_block_devices(bundle_spec))
        or bool(disks_among(request.options)),
        programs_32bit=bundle_spec is not None and wants_32bit(bundle_spec),
        volumes=volumes,
        shares=any(read_volume(context.layout, path) is None for path in volumes),
        auto_remove=request.remove,
        labels=request.labels,
        restart=str(request.restart),
    )


def _sources(options: ContainerOptions) -> tuple[str, ...]:
    """What of the host is mounted."""
    program = (options.init_program,) if options.init_program else ()
    return (*(each.source for each in options.volumes), *program)


def limits_of(options: ContainerOptions, bundle_spec: oci.Spec | None = None) -> ContainerLimits:
    if bundle_spec is None:
        return ContainerLimits(memory_bytes=options.memory_bytes, cpus=options.cpus)
    return ContainerLimits(memory_bytes=bundle_spec.memory_limit, cpus=bundle_spec.cpu_limit)


def _cgroups_path(config: Config, container_id: str, bundle_spec: oci.Spec | None) -> str | None:
    """With sandbox_cgroup_only=false the cgroups are those of a pod, from whose limits they keep a VM's own threads:
    here nobody has set such limits."""
    if not config.runtime.sandbox_cgroup_only:
        return None
    return path_without_engine(container_id, bundle_spec.linux.cgroups_path if bundle_spec is not None else "")


def _load_bundle(request: RunRequest) -> oci.Spec:
    assert request.bundle is not None
    spec = read_bundle(request.bundle)
    return structs.replace(
        spec,
        process=structs.replace(
            spec.process,
            terminal=spec.process.terminal or request.options.tty,
            console_size=request.options.console_size,
        ),
    )
