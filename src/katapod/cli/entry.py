"""Where `kata-runtime` begins: a pool is asked first, before anything heavy is loaded."""

from __future__ import annotations

import os
import sys

from katapod.supervisor.pool_client import run_in_pool

TYPE_CHECKING = False
if TYPE_CHECKING:  # without importing typing, which a start from the pool would pay for
    from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    status = run_in_pool(sys.argv[1:])
    if status is not None:
        os._exit(status)  # nothing is open or buffered here: the pool has written to our streams itself
    from katapod.cli.main import main as load_and_run

    load_and_run()
