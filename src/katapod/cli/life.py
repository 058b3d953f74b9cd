"""`wait`, `stop`, `attach`: the end of containers, waited for or asked for."""

import asyncio
import contextlib
import signal
import sys
from typing import TYPE_CHECKING

import click

from katapod.cli.command import argument, flag, option, verb
from katapod.cli.containers import each, the_names
from katapod.cli.settings import Globals, need_root
from katapod.model.errors import InvalidState, KatapodError
from katapod.model.exit_status import KILLED_STATUS
from katapod.model.ids import parse_container_name
from katapod.model.record import State

if TYPE_CHECKING:
    from katapod.host.state import StateStore
    from katapod.model.record import ContainerRecord

__all__ = ["attach", "attach_to", "stop", "stop_container", "wait"]

ASK_EVERY_S = 0.05


@verb("wait")
@the_names
@click.pass_obj
def wait(settings: Globals, names: tuple[str, ...]) -> int:
    """Wait until containers have ended, and print the exit status of each."""
    need_root("wait")
    store = settings.states()

    async def one(name: str) -> None:
        print(await wait_ended(store, name), flush=True)

    return each(names, one)


async def wait_ended(store: "StateStore", name: str) -> int:
    """Its exit status, once it has ended and its supervisor has gone. Raises NotFound, KatapodError."""
    from katapod.sandbox.client import connect_control
    from katapod.sandbox.endings import until_supervisor_ended

    policy = store.read(name).restart
    try:
        async with connect_control(store, name) as client:
            status = await client.wait(name)
    except InvalidState:
        status = _recorded_end(store, name)
    if policy == "no":  # else it may be about to start again
        await until_supervisor_ended(store.layout.sandbox(name))
    return status


def _recorded_end(store: "StateStore", name: str) -> int:
    """Of one that has stopped, or whose supervisor was killed. Raises NotFound, InvalidState."""
    record = store.read(name)
    container = record.containers[0] if record.containers else None
    if record.state is State.CREATED:  # as docker's
        return 0
    if container is not None and container.exit_code is not None:
        return container.exit_code
    if container is None or container.state is State.CREATING:
        raise InvalidState(f"cannot wait for container {name}: it has not started")
    return KILLED_STATUS


@verb("stop")
@argument("names", nargs=-1, metavar="NAME...", help="Names of containers.")
@option(
    "-t", "--time", "--timeout", "limit", metavar="SECONDS", help="Time until SIGKILL; default: its --stop-timeout."
)
@option("-s", "--signal", "number", metavar="SIGNAL", help="Signal to begin with; default: as run says.")
@flag("-i", "--ignore", help="One that is not there is no error.")
@flag("-a", "--all", "everything", help="All that run.")
@flag("--for-reboot", help="The host is about to end: a policy unless-stopped starts them again with it.")
@click.pass_obj
def stop(settings: Globals, /, names: tuple[str, ...], limit: str, number: str, **flags: bool) -> int:
    """Ask containers to end, and kill them if they have not ended in time. Prints their names.

    A container that has stopped keeps its record, its log and its files: start runs it again.
    """
    need_root("stop")
    from katapod.model.errors import NotFound, UsageError
    from katapod.model.flags import parse_signal, parse_stop_timeout
    from katapod.sandbox.endings import note_stop

    store = settings.states()
    limit_s = parse_stop_timeout(limit, "--time") if limit else -1
    wanted = parse_signal(number) if number else 0

    if flags["everything"] and not names:
        names = _all_up(store)
    elif flags["everything"] or not names:
        raise UsageError("cannot stop: give the names of containers, or --all")

    async def one(name: str) -> None:
        try:
            await stop_container(store, name, limit_s, wanted)
            if flags["for_reboot"] and _is_there(store, name):
                note_stop(store, name, asked=False)
        except NotFound:
            if not flags["ignore"]:
                raise
        print(name, flush=True)

    return each(names, one)


def _all_up(store: "StateStore") -> tuple[str, ...]:
    from katapod.sandbox.listing import list_sandboxes

    records = [one.record for one in list_sandboxes(store) if not (one.lost or one.record.pod)]
    return tuple(each.sandbox_id for each in records if not each.at_rest or each.restart_at)


async def stop_container(store: "StateStore", name: str, limit_s: int | None, wanted: int) -> None:
    """`limit_s`: None: there is none; -1: the container's own. Raises NotFound, KatapodError."""
    from katapod.host.event_log import note_event
    from katapod.sandbox.endings import end_policy, until_supervisor_ended

    told = store.read(name)
    while not await end_policy(store, name):
        record = store.read(name)
        container = record.containers[0] if record.containers else None
        if container is None or record.at_rest:
            return
        await _ask_to_end(store, container, container.stop_timeout_s if limit_s == -1 else limit_s, wanted)
        if not _is_there(store, name):
            break
        if record.restart == "no" or store.read(name).stop_asked:
            await until_supervisor_ended(store.layout.sandbox(name))
            break
        await asyncio.sleep(ASK_EVERY_S)  # it has ended by itself, and its policy is about to start it again
    note_event(store.layout, "stop", told)


async def _ask_to_end(store: "StateStore", container: "ContainerRecord", limit_s: int | None, wanted: int) -> None:
    """One that has ended by itself meanwhile is no error, nor is one that is not there any more, or not yet again."""
    from katapod.model.errors import NotFound
    from katapod.sandbox.client import connect_control

    name = container.container_id
    with contextlib.suppress(InvalidState, NotFound):
        async with connect_control(store, name) as client:
            await client.kill(name, wanted or container.stop_signal)
            try:
                async with asyncio.timeout(limit_s):
                    await client.wait(name)
            except TimeoutError:
                await client.kill(name, signal.SIGKILL)


def _is_there(store: "StateStore", name: str) -> bool:
    with contextlib.suppress(KatapodError):
        store.read(name)
        return True
    return False


@verb("attach")
@argument("name", metavar="NAME", help="Name of a running container.")
@flag("--no-stdin", help="Do not attach standard input, which is never attached.")
@flag("--sig-proxy", help="Pass signals on to the container; default: true.", default=True)
@option("--detach-keys", metavar="KEYS", help="Not needed: see below.")
@click.pass_obj
def attach(settings: Globals, name: str, no_stdin: bool, sig_proxy: bool, detach_keys: str) -> int:
    """Print what a running container writes from now on, until it ends; the exit status is the container's.

    Signals are passed on to the container; with --sig-proxy=false they end this command alone. Standard input of a
    container in the background is closed: exec -it NAME sh gives a terminal in it.
    """
    need_root("attach")
    store = settings.states()
    parse_container_name(name)
    return attach_to(store, name, sig_proxy=sig_proxy)


def attach_to(store: "StateStore", name: str, *, sig_proxy: bool) -> int:
    """Returns its exit status. Raises NotFound, InvalidState if it does not run."""
    if store.read(name).is_over:
        raise InvalidState(f"cannot attach to container {name}: it has stopped", hint=f"kata-runtime logs {name}")
    return asyncio.run(_attach(store, name, sig_proxy=sig_proxy))


async def _attach(store: "StateStore", name: str, *, sig_proxy: bool) -> int:
    from katapod.cli.logs import print_line
    from katapod.sandbox.client import connect_control
    from katapod.sandbox.container_log import read_log
    from katapod.supervisor.run import FORWARDED
    from katapod.tasks import Background, together

    def follow() -> None:
        for line in read_log(store, name, follow=True, tail=0):
            print_line(line)

    async with connect_control(store, name) as client, Background() as background:

        def pass_on(number: int) -> None:
            background.start(client.kill(name, number), name="pass-on")

        if not sig_proxy:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends us at once, the thread that prints included
        else:
            for number in FORWARDED:
                asyncio.get_running_loop().add_signal_handler(number, pass_on, number)
        status, _ = await together(client.wait(name), asyncio.to_thread(follow))
    sys.stdout.flush()
    return status
