"""Where `kata-runtime` begins: the words of OCI engines go to oci/; else a pool, or who holds a sandbox, is asked
first, before anything heavy is loaded."""

from __future__ import annotations

import os
import sys

from katapod.oci.words import speaks_oci

TYPE_CHECKING = False
if TYPE_CHECKING:  # without importing typing, which a start from the pool would pay for
    from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    words = sys.argv[1:]
    if speaks_oci(words):
        from katapod.oci.main import main as carry_out

        carry_out(words)
    from katapod.supervisor.exec_client import exec_by_supervisor
    from katapod.supervisor.pool_client import run_in_pool

    status = exec_by_supervisor(words)
    if status is None:
        status = run_in_pool(words)
    if status is not None:
        os._exit(status)  # nothing else is open or buffered here: the other process has written to our streams itself
    from katapod.cli.main import main as load_and_run

    load_and_run()
