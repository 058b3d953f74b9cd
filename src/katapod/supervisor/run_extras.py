"""What `run` does around a container beside running it."""

import logging
import os
from pathlib import Path

from msgspec.structs import replace

from katapod.model.errors import KatapodError, UsageError
from katapod.model.net_flags import NO_NETWORK, parse_expose
from katapod.supervisor.image_policy import bring_in
from katapod.supervisor.run_context import RunContext
from katapod.supervisor.run_request import RunRequest

__all__ = ["remove_image", "with_exposed_ports", "write_cid_file"]

log = logging.getLogger(__name__)


async def with_exposed_ports(context: RunContext, request: RunRequest, registries: tuple[str, ...]) -> RunRequest:
    """With --publish-all: its exposed ports and the image's are published, so the image is brought in before the
    network is made. Raises UsageError, and as bring_in."""
    if not request.publish_all or request.network.name == NO_NETWORK:
        return request
    ports = list(request.exposed)
    if request.image:
        store = context.image_store()
        image = await bring_in(store, request, None, registries)
        if not request.image_digest:
            await store.release(request.sandbox_id)
        for text in image.config.exposed_ports:
            ports += parse_expose(text, "the image's port")
        policy = replace(request.image_policy, pull="missing")
        request = replace(request, image_policy=policy)
    taken = {(port.container_port, port.protocol) for port in request.network.ports}
    more = {
        (port.container_port, port.protocol): port
        for port in ports
        if (port.container_port, port.protocol) not in taken
    }
    return replace(request, network=replace(request.network, ports=(*request.network.ports, *more.values())))


def write_cid_file(path: Path, container_id: str) -> None:
    """Raises UsageError if it is there, KatapodError."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError as exc:
        raise UsageError(
            f"cannot write --cidfile {path}: it is there already", hint="remove it, or name another"
        ) from exc
    except OSError as exc:
        raise KatapodError(f"cannot write --cidfile {path}: {exc.strerror}") from exc
    with os.fdopen(handle, "w") as file:
        file.write(container_id)


async def remove_image(context: RunContext, request: RunRequest) -> None:
    """What stays because others use it is told of."""
    try:
        await context.image_store().remove(request.image)
    except KatapodError as exc:
        log.warning("the image stays: %s", exc)
