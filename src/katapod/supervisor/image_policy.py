"""When a registry is asked for the image of a container, and how."""

from katapod.images import Access, ImageStore, Progress
from katapod.images.errors import ImageNotFound
from katapod.model.errors import UsageError
from katapod.model.image import ImageRecord, StoredName, Transport, parse_image_ref, suggest_name
from katapod.supervisor.kept import held_image
from katapod.supervisor.run_request import RunRequest

__all__ = ["bring_in"]


async def bring_in(
    store: ImageStore, request: RunRequest, progress: Progress | None, registries: tuple[str, ...] = ()
) -> ImageRecord:
    """The image that is asked for, held for the sandbox from then on. `registries`: as Access has them.

    Raises UsageError, and as ImageStore.acquire.
    """
    if request.image_digest:
        return await held_image(store, request)
    policy = request.image_policy
    asked = None if policy.pull == "never" else registries
    access = Access(tls_verify=policy.tls_verify, authfile=policy.authfile, registries=asked)
    reference = parse_image_ref(request.image)
    remote = not isinstance(reference, StoredName) and reference.transport is Transport.DOCKER
    if policy.pull == "never" and remote:
        assert not isinstance(reference, StoredName)
        if suggest_name(reference).text not in {name for each in await store.list_images() for name in each.names}:
            raise ImageNotFound(
                f"cannot use {request.image}: it is not in the store, and --pull never forbids to ask its registry",
                hint=f"kata-runtime image pull {request.image}",
            )
    if policy.pull == "always":
        source, name = (request.image, None) if remote else await _origin(store, request.image)
        record = await store.pull(source, name, access=access, progress=progress, holder=request.sandbox_id)
        await store.hold(record.digest, request.sandbox_id)
        return record
    return await store.acquire(request.image, request.sandbox_id, access=access, progress=progress)


async def _origin(store: ImageStore, text: str) -> tuple[str, str | None]:
    """(reference, name) by which a stored image has come from a registry. Raises UsageError, and as resolve."""
    try:
        record = await store.resolve(text)
    except ImageNotFound:
        return text, None  # from the registries
    if not record.source.startswith("docker://"):
        raise UsageError(
            f"cannot pull {text}: it has not come from a registry, but from {record.source}",
            hint="leave out --pull, or name one: docker://HOST/NAME:TAG",
        )
    return record.source, record.names[0] if record.names else None
