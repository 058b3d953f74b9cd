"""Kernel modules that several builds of a guest image put into it are packed once.

That is half of a build's time, and gives the same bytes each time: for tests that are not about what is built.
"""

import contextlib
import functools
from collections.abc import Iterator

import pytest

from katapod.osbuilder import stage
from katapod.osbuilder.module_file import pack_module

__all__ = ["modules_packed_each_time", "modules_packed_once"]


@contextlib.contextmanager
def modules_packed_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "pack_module", functools.cache(pack_module))
        yield


@contextlib.contextmanager
def modules_packed_each_time() -> Iterator[None]:
    """Within a block of the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "pack_module", pack_module)
        yield
