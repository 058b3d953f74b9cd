"""Remove a sandbox from what is on disk alone: its supervisor may be alive, dead, or killed half-way.

All that a sandbox acquires lies in directories named by its id or carries the id on its command line. With a machine
of the pool that is the machine's id for some of them, and the sandbox's record has it.
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from katapod.host.cgroup import remove_cgroups
from katapod.host.direct_volumes import forget_volumes
from katapod.host.event_log import note_event
from katapod.host.facts import boot_time
from katapod.host.locks import is_stopped, lock_holder
from katapod.host.mountinfo import mounts_below
from katapod.host.named_netns import current_netns, netns_path, remove_netns
from katapod.host.netns import detach_recorded
from katapod.host.removal import clear_away, sweep_aside
from katapod.host.state import StateStore, supervisor_alive
from katapod.images import ImageStore
from katapod.model.errors import AlreadyExists, InvalidState, KatapodError, NotFound
from katapod.model.exit_status import KILLED_STATUS
from katapod.model.ids import ContainerId, parse_container_name
from katapod.model.layout import Layout
from katapod.model.record import SandboxRecord, State, killed_containers
from katapod.sandbox.attachment import release_attachment
from katapod.tasks import finish
from katapod.vmm.processes import is_vm

__all__ = [
    "adopt_kept",
    "find_leftovers",
    "put_back",
    "reap_dead",
    "release_kept",
    "remove_sandbox",
    "rested",
    "settle",
    "why_not",
]

log = logging.getLogger(__name__)

TERM_GRACE_S = 10.0
KILL_GRACE_S = 5.0
REAP_LIMIT_S = 2.0  # for what others have left to be removed in: who starts a sandbox waits for it
DEAD_SUPERVISOR = "the process that ran it was killed"
HOST_RESTARTED = "this host was started anew"


async def remove_sandbox(
    store: StateStore,
    sandbox_id: str,
    *,
    force: bool = False,
    grace_s: float = TERM_GRACE_S,
    deadline: float | None = None,
) -> None:
    """Remove all of a sandbox; with `force`, a living supervisor is ended first: asked, after `grace_s` killed.
    Idempotent.

    What is not removed when time.monotonic() has passed `deadline` is set aside (host/removal.py). Every step runs
    even if one fails; raises KatapodError that names all that could not be removed, and keeps the record then.
    Raises InvalidState if another process owns the sandbox and `force` is not set.
    """
    if force:
        await asyncio.to_thread(_end_supervisor, store, sandbox_id, grace_s)
    with contextlib.ExitStack() as stack:
        there = await asyncio.to_thread(stack.enter_context, store.removal(sandbox_id, deadline))
        if not there:
            return
        paths = store.layout.sandbox(sandbox_id)
        if supervisor_alive(paths) and lock_holder(paths.lock) not in (None, os.getpid()):
            raise InvalidState(f"cannot remove {sandbox_id}: it is in use")
        problems = await asyncio.to_thread(_remove_files, store, sandbox_id, deadline)
        problems += await _release_network(store, sandbox_id, insist=force)
        try:
            await ImageStore(store.layout.image_root).release(ContainerId(sandbox_id))
            if not problems:
                record = _readable(store, sandbox_id)
                store.discard(sandbox_id)
                if record is not None and record.containers:
                    note_event(store.layout, "destroy", record)
        except (OSError, KatapodError) as exc:
            problems.append(str(exc))
        if problems:
            raise KatapodError(f"cannot remove all of {sandbox_id}: {'; '.join(problems)}", hint="try again")


def _readable(store: StateStore, sandbox_id: str) -> SandboxRecord | None:
    with contextlib.suppress(KatapodError):
        return store.read(sandbox_id)
    return None


def _remove_files(store: StateStore, sandbox_id: str, deadline: float | None) -> list[str]:
    """End the processes and remove all but the state directory; returns what did not work."""
    problems = []
    machine_id = _machine_of(store, sandbox_id)
    for pid in _processes_of(store.layout, machine_id):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if not _wait_gone(pid, KILL_GRACE_S):
            problems.append(f"process {pid} does not end")
    problems += remove_cgroups(_cgroups_of(store, sandbox_id))
    try:
        forget_volumes(store.layout, sandbox_id)
    except OSError as exc:  # the rest is removed
        problems.append(f"direct volumes: {exc}")
    paths = store.layout.sandbox(sandbox_id, machine_id)
    for directory in paths.all:
        if directory == paths.state:
            continue
        try:
            clear_away(store.layout, directory, deadline=deadline)
        except (OSError, KatapodError) as exc:
            problems.append(f"{directory}: {exc}")
    if machine_id != sandbox_id:
        try:
            store.discard(machine_id)  # its supervisor died while it was handing the machine over
        except OSError as exc:
            problems.append(f"{machine_id}: {exc}")
    return problems


async def _release_network(store: StateStore, sandbox_id: str, *, insist: bool) -> list[str]:
    """Undo what was made in the pod's network namespace, then its attachment; returns what did not work.

    Who insists gets rid of the sandbox all the same, and hears what plugins may have left.
    """
    problems: list[str] = []
    try:
        await _detach_network(store, sandbox_id)
    except (OSError, KatapodError) as exc:
        problems.append(str(exc))
    attachment = None
    try:
        attachment = store.read(sandbox_id).attachment
    except KatapodError as exc:
        log.debug("%s: %s", sandbox_id, exc)
    if attachment is None:  # a namespace that an engine was to fill, or whose record cannot be read
        try:
            remove_netns(netns_path(sandbox_id))
        except KatapodError as error:
            problems.append(str(error))
    else:
        left = [str(problem) for problem in await release_attachment(attachment, sandbox_id)]
        if left and insist:
            log.warning("%s is removed, but its network was not undone: %s", sandbox_id, "; ".join(left))
        else:
            problems += left
    return problems


async def release_kept(store: StateStore, sandbox_id: str) -> None:
    """Undo the attachment of a sandbox that has stopped and whose record stays; that says so then. Idempotent.

    What does not work is said, and left in the record: the next `run` tries again.
    """
    with contextlib.ExitStack() as stack:
        if not await asyncio.to_thread(stack.enter_context, store.removal(sandbox_id)):
            return
        try:
            record = store.read(sandbox_id)
        except KatapodError:
            return
        if record.attachment is None:
            return
        if problems := await release_attachment(record.attachment, sandbox_id):
            text = "; ".join(str(problem) for problem in problems)
            log.warning("the network of %s is not undone, the next run tries again: %s", sandbox_id, text)
        else:
            store.write(msgspec.structs.replace(record, attachment=None))


def _is_elsewhere(record: SandboxRecord) -> bool:
    """Whether its plugins worked in another network namespace than ours: they could undo nothing from here."""
    return record.attachment is not None and record.attachment.host_netns != current_netns()


async def _detach_network(store: StateStore, sandbox_id: str) -> None:
    """Undo what was made in the pod's network namespace. Raises KatapodError, OSError."""
    try:
        record = store.read(sandbox_id)
    except KatapodError:
        return
    if record.network is not None:
        await detach_recorded(record.network)
        store.write(msgspec.structs.replace(record, network=None))


def _machine_of(store: StateStore, sandbox_id: str) -> str:
    """The id of its machine: another than its own if that came from the pool."""
    with contextlib.suppress(KatapodError):
        return store.read(sandbox_id).machine_id or sandbox_id
    return sandbox_id


def _cgroups_of(store: StateStore, sandbox_id: str) -> tuple[str, ...]:
    with contextlib.suppress(KatapodError):
        return store.read(sandbox_id).cgroups
    return ()


async def reap_dead(store: StateStore) -> list[str]:
    """Clean up after supervisors that were killed: called by every `run`, so that nothing is left for long.

    A sandbox that was to be removed at its end, or that never ran, goes away; another keeps its record, as
    stopped, and its log. Returns the ids. Raises nothing: what they left, whatever it is, is no reason not to run
    something else. It is told of, and the next call tries again.
    """
    deadline = time.monotonic() + REAP_LIMIT_S
    reaped = []
    with contextlib.suppress(OSError):
        store.sweep()
    dead = [each for each in _each_id(store.ids) if not supervisor_alive(store.layout.sandbox(each))]
    strays = _each_id(lambda: store.stray_ids(boot_time()))
    for reap, sandbox_ids in ((_reap, dead), (_reap_stray, strays)):
        for sandbox_id in sandbox_ids:
            try:
                if await reap(store, sandbox_id, deadline):
                    reaped.append(sandbox_id)
            except Exception as exc:
                log.warning("cannot clean up after %s: %s", sandbox_id, exc)
    await finish(asyncio.to_thread(sweep_aside, store.layout, deadline), name="sweep-aside")
    return reaped


def _each_id(find: Callable[[], list[str]]) -> list[str]:
    try:
        return find()
    except OSError as exc:
        log.warning("cannot look for leftovers of other sandboxes: %s", exc)
        return []


async def _reap_stray(store: StateStore, sandbox_id: str, deadline: float) -> bool:
    """Own what is left of the sandbox, so that nobody takes its name meanwhile, and remove it."""
    if await _adopt(store, sandbox_id):
        return False
    record = SandboxRecord(parse_container_name(sandbox_id), time.time(), os.getpid(), boot_id="", auto_remove=True)
    try:
        lock = store.create(record)
    except AlreadyExists:
        return False
    try:
        await finish(remove_sandbox(store, sandbox_id, deadline=deadline), name="reap-stray")
    finally:
        os.close(lock)
    return True


async def _reap(store: StateStore, sandbox_id: str, deadline: float) -> bool:
    try:
        record = store.read(sandbox_id)
    except NotFound:
        return False  # removed since we looked
    except KatapodError as exc:
        log.info("%s is passed over: %s", sandbox_id, exc)  # another runtime keeps its sandboxes here, too
        return False
    if _is_elsewhere(record):
        log.info("%s is passed over: its network was made from another network namespace", sandbox_id)
        return False
    if record.at_rest and not record.restart_at:
        await release_kept(store, sandbox_id)  # nothing, unless that failed when it stopped
        return False
    log.info("%s was left behind: %s", sandbox_id, DEAD_SUPERVISOR)
    if record.auto_remove or not (record.lasting or any(item.started_at for item in record.containers)):
        # a signal must not give the removal's lock away while its thread is at work
        await finish(remove_sandbox(store, sandbox_id, deadline=deadline), name="reap")
    else:
        await finish(asyncio.to_thread(settle, store, record, DEAD_SUPERVISOR, deadline), name="settle")
        await _detach_network(store, sandbox_id)
        await release_kept(store, sandbox_id)
    return True


def settle(store: StateStore, record: SandboxRecord, error: str, deadline: float | None = None) -> None:
    """Bring a dead sandbox to rest: nothing of the VM stays, the record says `stopped` and why; or that it was not
    started yet, as before it was tried.

    `deadline` as in remove_sandbox. Raises KatapodError.
    """
    with store.removal(record.sandbox_id, deadline) as there:
        if not there or supervisor_alive(store.layout.sandbox(record.sandbox_id)):
            return
        _clear_machine(store, record, deadline)
        containers = killed_containers(record.containers, error, time.time())
        settled = msgspec.structs.replace(record, state=State.STOPPED, containers=containers)
        before = store.kept(record.sandbox_id)
        if before is not None and record.lasting and not containers:  # it was killed before it had the container again
            settled = _brought_to_rest(before, error)
        settled = msgspec.structs.replace(
            settled,
            error=error,
            vmm_pid=0,
            machine_id="",
            restart_at=0.0,
            attachment=record.attachment,
            network=record.network,
        )
        store.write(settled)
        if any(item.state is not State.STOPPED and item.started_at for item in record.containers):
            note_event(store.layout, "die", settled, exitCode=KILLED_STATUS)
        if before is not None:
            store.keep(settled)


def _brought_to_rest(kept: SandboxRecord, error: str) -> SandboxRecord:
    """What was kept of a sandbox, which may have run then, now that it does not."""
    if kept.state is State.CREATED:
        return kept
    return msgspec.structs.replace(
        kept, state=State.STOPPED, containers=killed_containers(kept.containers, error, time.time())
    )


async def put_back(store: StateStore, before: SandboxRecord, error: str) -> None:
    """Bring a sandbox of this process, whose start has failed, to rest as it was; its record says why. Raises
    KatapodError."""
    sandbox_id = before.sandbox_id

    def clear() -> None:
        with store.removal(sandbox_id) as there:
            if there:
                _clear_machine(store, store.read(sandbox_id), None)

    await asyncio.to_thread(clear)
    await _detach_network(store, sandbox_id)
    await release_kept(store, sandbox_id)
    with store.removal(sandbox_id) as there:
        if there:
            left = store.read(sandbox_id).attachment
            store.write(msgspec.structs.replace(before, attachment=left, error=error))


def why_not(exc: BaseException) -> str:
    return str(exc) if isinstance(exc, KatapodError) else "its start was broken off"


async def rested(store: StateStore, sandbox_id: str) -> SandboxRecord:
    """The record of a sandbox that is at rest, to which it is brought if its supervisor was killed. Raises NotFound,
    InvalidState if it runs."""
    record = store.read(sandbox_id)
    if not supervisor_alive(store.layout.sandbox(sandbox_id)) and (not record.at_rest or record.restart_at):
        await _reap(store, sandbox_id, time.monotonic() + REAP_LIMIT_S)
        record = store.read(sandbox_id)
    if not record.at_rest:
        raise InvalidState(f"cannot start container {sandbox_id}: it is {record.shown_state.value}")
    return record


async def adopt_kept(store: StateStore) -> None:
    """Have the containers that can be started again on record, after a start of the host, which empties /run."""
    for sandbox_id in _each_id(lambda: store.stray_ids(boot_time())):
        with contextlib.suppress(KatapodError, OSError):
            await _adopt(store, sandbox_id)


async def _adopt(store: StateStore, sandbox_id: str) -> bool:
    """Have one on record; whether it can be started again. What it had of networks is undone. Raises KatapodError."""
    kept = store.kept(sandbox_id)
    if kept is None or kept.sandbox_id != sandbox_id or (kept.auto_remove and kept.state is not State.CREATED):
        return False
    changed = msgspec.structs.replace(
        _brought_to_rest(kept, HOST_RESTARTED), vmm_pid=0, machine_id="", network=None, cgroups=(), restart_at=0.0
    )
    try:
        os.close(store.create(changed))
    except AlreadyExists:
        return True
    await release_kept(store, sandbox_id)
    return True


def _clear_machine(store: StateStore, record: SandboxRecord, deadline: float | None) -> None:
    """Nothing of the VM stays. The caller is the only one who removes. Raises KatapodError."""
    machine_id = record.machine_id or record.sandbox_id
    paths = store.layout.sandbox(record.sandbox_id, machine_id)
    for pid in _processes_of(store.layout, machine_id):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _wait_gone(pid, KILL_GRACE_S)
    for problem in remove_cgroups(record.cgroups):
        log.warning("something of %s stays: %s", record.sandbox_id, problem)
    for directory in (paths.share, paths.vm, paths.layers):
        clear_away(store.layout, directory, deadline=deadline)
    if machine_id != record.sandbox_id:
        store.discard(machine_id)
    store.drop_devices(record.sandbox_id)


def find_leftovers(layout: Layout, sandbox_id: str) -> list[str]:
    """What is still there of a sandbox, in words: for tests and for `check`."""
    paths = layout.sandbox(sandbox_id)
    found = [f"directory {directory}" for directory in paths.all if directory.exists()]
    found += [f"process {pid}" for pid in _processes_of(layout, sandbox_id)]
    if netns_path(sandbox_id).exists():
        found.append(f"network namespace {netns_path(sandbox_id)}")
    found += [f"mount {point}" for directory in paths.all for point in mounts_below(directory)]
    return found


def _end_supervisor(store: StateStore, sandbox_id: str, grace_s: float) -> None:
    paths = store.layout.sandbox(sandbox_id)
    if not supervisor_alive(paths):
        return
    pid = lock_holder(paths.lock)
    if pid is None:
        if not supervisor_alive(paths):
            return
        raise KatapodError(f"cannot end the supervisor of {sandbox_id}: it lives, but not in this PID namespace")
    # one that is stopped would not come to see a request
    asked = () if is_stopped(pid) else ((signal.SIGTERM, grace_s),)
    for number, limit_s in (*asked, (signal.SIGKILL, KILL_GRACE_S)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if not supervisor_alive(paths):
                return
            time.sleep(0.02)
    raise KatapodError(f"cannot end the supervisor of {sandbox_id}: process {pid} ignores SIGKILL")


def _processes_of(layout: Layout, machine_id: str) -> Iterator[int]:
    """VMM and virtiofsd of this machine: their command lines name its directories, which no other layout has."""
    paths = layout.sandbox(machine_id)
    shares = (f"{paths.shared},", f"{paths.shared}\0")
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            command = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace")
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ESRCH):
                raise
            continue
        is_share = "virtiofsd" in command.partition("\0")[0] and any(mark in command for mark in shares)
        if is_share or is_vm(command, paths.vm):
            yield int(entry)


def _wait_gone(pid: int, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":  # dead, and its parent's to collect
            return True
        time.sleep(0.01)
    return False
