"""Where tests keep the sandboxes that they start through the library."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapod.host.removal import remove_tree
from katapod.host.state import StateStore
from katapod.model.layout import Layout

__all__ = ["layout_below", "store"]


def layout_below(root: Path) -> Layout:
    """All roots below one directory, whose path must be short: it holds sockets."""
    return Layout(
        state_root=root / "sbs",
        vm_root=root / "vm",
        share_root=root / "share",
        data_root=root / "data",
        image_root=root / "images",
    )


@pytest.fixture(scope="module")
def store() -> Iterator[StateStore]:
    """Records of sandboxes in a directory of the module's own, with all that belongs to them."""
    root = Path(tempfile.mkdtemp(prefix="kt-", dir="/run"))  # short: socket paths have 107 bytes
    yield StateStore(layout_below(root))
    remove_tree(root)
