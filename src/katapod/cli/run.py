"""`kata-runtime run`, in the words that users of `docker run` know."""

from typing import Any

import click

from katapod.cli import is_loaded
from katapod.cli.command import HOST_PATH, argument, verb
from katapod.cli.declared import declared
from katapod.cli.handed_over import read_exec
from katapod.cli.run_options import RUN_OPTIONS
from katapod.cli.run_request import RunFlags, run_request
from katapod.cli.settings import Globals, need_root
from katapod.host.trace import span

__all__ = ["run"]


@verb("run", context_settings={"allow_interspersed_args": False, "help_option_names": ["--help"]})
@argument(
    "words",
    nargs=-1,
    metavar="IMAGE [COMMAND...]",
    type=HOST_PATH,
    help="A stored image, or oci:PATH, oci-archive:FILE, docker-archive:FILE, docker://HOST/NAME:TAG. "
    "Not given with --rootfs or --bundle.",
)
@declared(RUN_OPTIONS)
@click.pass_obj
def run(settings: Globals, /, **parameters: Any) -> int:
    """Run a command in a new container, in a virtual machine of its own.

    The exit status is that of the command, or 125 if Katapod failed, 126 if the command cannot be executed, 127 if it
    was not found, and 137 if it was killed, for example because of its memory limit.
    """
    flags = RunFlags(**parameters)
    with span("load the runtime"):
        import asyncio

        from katapod.host.own_mounts import leave_host_mounts
        from katapod.supervisor.run import run_attached, run_detached

        is_loaded()
    need_root("run")
    request = run_request(flags)
    context = settings.run_context(read_exec)
    if settings.keep_run is not None:
        settings.keep_run(context, request, flags.detach)
        return 0
    if flags.detach:
        status = run_detached(context, request)
        if status == 0:
            print(request.container_id)
        return status
    leave_host_mounts()
    return asyncio.run(run_attached(context, request))
