"""Whether this node has a guest image for User-mode Linux."""

from pathlib import Path

import pytest

from katapod.model.flavour import initrd_link

__all__ = ["needs_uml_image"]

DISK = Path("/var/cache/kata-containers") / initrd_link("agent", "uml")

needs_uml_image = pytest.mark.skipif(
    not DISK.exists(), reason="needs a guest image for User-mode Linux: kata-runtime image build"
)
