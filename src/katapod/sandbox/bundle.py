"""Reading a bundle's config.json, and saying what of it a guest goes without."""

import logging
from pathlib import Path

from katapod.model import oci
from katapod.model.errors import NotFound
from katapod.plan.left_out import left_out

__all__ = ["read_bundle"]

log = logging.getLogger(__name__)


def read_bundle(bundle: Path) -> oci.Spec:
    """The spec of the bundle at an absolute path. What the guest goes without is logged, by its place in the file.

    Raises SpecError, also for what it cannot go without; NotFound.
    """
    path = bundle / "config.json"
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise NotFound(f"cannot read {path}: {exc.strerror}", hint="a bundle has a config.json and a rootfs") from exc
    spec = oci.parse_bundle_spec(data, str(bundle), str(path))
    for gap in left_out(spec, oci.unknown_keys(data, spec)):
        log.log(
            logging.WARNING if gap.matters else logging.DEBUG, "%s: %s is not applied: %s", path, gap.place, gap.why
        )
    return spec
