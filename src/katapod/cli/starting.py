"""`create`, `start`, `restart`, `rename`: containers that stay when they have ended, and their files with them."""

import asyncio
from typing import TYPE_CHECKING, Any

import click

from katapod.cli.command import HOST_PATH, argument, flag, option, repeatable, verb
from katapod.cli.containers import the_names
from katapod.cli.declared import declared
from katapod.cli.handed_over import read_exec
from katapod.cli.run_options import CREATE_OPTIONS
from katapod.cli.settings import Globals, need_root, print_error
from katapod.model.errors import InvalidState, KatapodError, NotFound, UsageError
from katapod.model.ids import parse_container_name
from katapod.model.record import SandboxRecord, State

if TYPE_CHECKING:
    from katapod.host.state import StateStore
    from katapod.supervisor.run_request import RunRequest

__all__ = ["create", "rename", "restart", "start"]

ENDING_LIMIT_S = 60.0


@verb("create", context_settings={"allow_interspersed_args": False, "help_option_names": ["--help"]})
@argument("words", nargs=-1, metavar="IMAGE [COMMAND...]", type=HOST_PATH, help="As run has them.")
@declared(CREATE_OPTIONS)
@click.pass_obj
def create(settings: Globals, /, **parameters: Any) -> int:
    """Make a container without starting it, and print its name; start runs it.

    Its image is held and its volumes are made from now on; it has no VM. A bundle is created by the command of OCI
    runtimes: create --bundle DIR ID.
    """
    from katapod.cli.run_request import RunFlags, run_request

    flags = RunFlags(**parameters, detach=False, sig_proxy=True, bundle="")
    need_root("create")
    from katapod.supervisor.creating import create_container

    request = run_request(flags, later=True)
    asyncio.run(create_container(settings.run_context(), request))
    print(request.container_id)
    return 0


@verb("start")
@argument("names", nargs=-1, metavar="NAME...", help="Names of containers.")
@flag("-a", "--attach", help="Attach to its output; the exit status is the container's.")
@flag("-i", "--interactive", help="Attach its standard input, too, if it was made with -i.")
@flag("--all", "everything", help="All that are at rest, or those that --filter names.")
@repeatable("-f", "--filter", "wanted", metavar="K=V", help="With --all: restart-policy=POLICY, or as list has them.")
@option("--detach-keys", metavar="KEYS", help="Not needed: a container that runs in the foreground ends with it.")
@click.pass_obj
def start(settings: Globals, /, names: tuple[str, ...], **flags: Any) -> int:
    """Start containers that were created or have stopped, and print their names. Each has its files as it left them,
    and what run or create said of it.

    One that runs already is no error. With --all --filter restart-policy=unless-stopped, which is for the start of the
    host, those that somebody has stopped are left alone.
    """
    need_root("start")
    store = settings.states()
    attach = flags["attach"] or flags["interactive"]
    if flags["everything"]:
        if names or attach:
            raise UsageError("cannot use --all with names or -a")
        names = tuple(_chosen(store, flags["wanted"]))
    elif flags["wanted"]:
        raise UsageError("cannot use --filter without --all")
    elif not names:
        raise UsageError("cannot start: no container given", hint="kata-runtime start NAME, or --all")
    if attach and len(names) > 1:
        raise UsageError("cannot start and attach several containers at once")
    if attach:
        return _start_attached(settings, parse_container_name(names[0]), interactive=flags["interactive"])
    return _each(names, lambda name: _start(settings, name))


@verb("restart")
@the_names
@option(
    "-t", "--time", "--timeout", "limit", metavar="SECONDS", help="Time until SIGKILL; default: its --stop-timeout."
)
@option("-s", "--signal", "number", metavar="SIGNAL", help="Signal to begin with; default: as run says.")
@click.pass_obj
def restart(settings: Globals, names: tuple[str, ...], limit: str, number: str) -> int:
    """Stop containers as stop does, and start them again in the background. Prints their names.

    One that has stopped, or was not started yet, is started.
    """
    need_root("restart")
    from katapod.cli.life import stop_container
    from katapod.host.event_log import note_event
    from katapod.model.flags import parse_signal, parse_stop_timeout

    limit_s = parse_stop_timeout(limit, "--time") if limit else -1
    wanted = parse_signal(number) if number else 0
    store = settings.states()

    def one(name: str) -> int:
        record = _found(store, name)
        if record.auto_remove and record.state is not State.CREATED:
            raise InvalidState(
                f"cannot restart container {name}: it is removed at its end, as --rm says",
                hint="run it without --rm",
            )
        _request_of(settings, name)  # before anything is stopped
        asyncio.run(stop_container(store, name, limit_s, wanted))
        status = _start(settings, name)
        if not status:
            note_event(settings.layout, "restart", store.read(name))
        return status

    return _each(names, one)


@verb("rename")
@argument("name", metavar="NAME", help="Name of a container that does not run.")
@argument("new_name", metavar="NEW_NAME", help="The name that it gets.")
@click.pass_obj
def rename(settings: Globals, name: str, new_name: str) -> None:
    """Give a container that has stopped, or was not started yet, another name.

    Its host name stays. While it runs its VM has its name: stop it first.
    """
    need_root("rename")
    from katapod.supervisor.renaming import rename_container

    old, new = parse_container_name(name), parse_container_name(new_name)
    store = settings.states()
    _found(store, old)
    if old == new:
        raise UsageError(f"cannot rename container {old}: that is its name")
    asyncio.run(rename_container(store, old, new))


def _each(names: tuple[str, ...], action: Any) -> int:
    """All are tried, errors are printed, the status says; that of a signal ends it."""
    failed = 0
    for name in names:
        try:
            status = action(parse_container_name(name))
        except KatapodError as exc:
            print_error(exc)
            status = 1
        if status and status > 1:
            return int(status)
        failed = failed or status or 0
        if not status:
            print(name, flush=True)
    return failed


def _chosen(store: "StateStore", wanted: tuple[str, ...]) -> list[str]:
    from katapod.observe.docker_view import container_row, matches, parse_filter
    from katapod.sandbox.listing import list_sandboxes
    from katapod.sandbox.recovery import adopt_kept

    asyncio.run(adopt_kept(store))
    policies = [text.partition("=")[2] for text in wanted if text.startswith("restart-policy=")]
    filters: dict[str, list[str]] = {}
    for text in wanted:
        if not text.startswith("restart-policy="):
            key, value = parse_filter(text)
            filters.setdefault(key, []).append(value)
    found = []
    for one in list_sandboxes(store):
        record = one.record
        kind = record.restart.partition(":")[0]
        if not (record.at_rest or one.lost) or record.pod:
            continue
        if policies and not _wants_start(record, kind, policies):
            continue
        if matches(container_row(record, lost=one.lost, now=0.0), record, filters):
            found.append(record.sandbox_id)
    return found


def _wants_start(record: SandboxRecord, kind: str, policies: list[str]) -> bool:
    """With a start of the host, as Docker does it."""
    if kind not in policies:
        return False
    failed = any(item.exit_code for item in record.containers)
    return kind == "always" or (not record.stop_asked and (kind != "on-failure" or failed))


def _found(store: "StateStore", name: str) -> SandboxRecord:
    """Raises NotFound."""
    from katapod.sandbox.recovery import adopt_kept

    try:
        return store.read(name)
    except NotFound:
        asyncio.run(adopt_kept(store))  # of before a start of the host
        return store.read(name)


def _request_of(settings: Globals, name: str) -> "RunRequest":
    """What starts it again. Raises NotFound, InvalidState, KatapodError."""
    from katapod.supervisor.kept import read_kept

    _found(settings.states(), name)
    return read_kept(settings.layout, name).again


def _is_up(store: "StateStore", record: SandboxRecord) -> bool:
    """Whether it runs, or its policy is about to start it; one that is on its way out is waited for. Raises
    InvalidState."""
    from katapod.host.state import supervisor_alive
    from katapod.sandbox.endings import until_supervisor_ended

    paths = store.layout.sandbox(record.sandbox_id)
    if not supervisor_alive(paths):
        return False
    if record.restart_at:
        return True
    if not record.is_over:
        if record.shown_state is State.PAUSED:
            raise InvalidState(
                f"cannot start container {record.sandbox_id}: it is paused",
                hint=f"kata-runtime resume {record.sandbox_id}",
            )
        return True

    async def ended() -> None:
        async with asyncio.timeout(ENDING_LIMIT_S):
            await until_supervisor_ended(paths)

    try:
        asyncio.run(ended())
    except TimeoutError as exc:
        raise InvalidState(f"cannot start container {record.sandbox_id}: it does not get done with its end") from exc
    return False


def _start(settings: Globals, name: str) -> int:
    """In the background. Raises KatapodError."""
    from katapod.supervisor.run import run_detached

    store = settings.states()
    if _is_up(store, _found(store, name)):
        return 0
    request = _request_of(settings, name)
    return run_detached(settings.run_context(read_exec), request)


def _start_attached(settings: Globals, name: str, *, interactive: bool) -> int:
    from msgspec.structs import replace

    from katapod.cli.life import attach_to
    from katapod.host.own_mounts import leave_host_mounts
    from katapod.supervisor.run import run_attached

    store = settings.states()
    if _is_up(store, _found(store, name)):
        return attach_to(store, name, sig_proxy=True)
    request = _request_of(settings, name)
    request = replace(request, interactive=interactive and request.interactive)
    context = settings.run_context(read_exec)
    leave_host_mounts()
    return asyncio.run(run_attached(context, request))
