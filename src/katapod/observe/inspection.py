"""All that can be found out of a sandbox from another process, without disturbing it: for inspect and kata-monitor.

Records, /proc and the network namespace are read here; the VMM and the guest are asked through the supervisor's
management socket. A supervisor that is stopped or hangs answers nobody: the VMM is asked beside it then. Whatever does
not answer, or ends meanwhile, is named in the facts with the reason.
"""

import asyncio
import json
import os
import time
from pathlib import Path

import msgspec
from msgspec.structs import replace

from katapod.host.mountinfo import read_mounts
from katapod.host.state import StateStore, supervisor_alive
from katapod.model.errors import KatapodError, NotFound
from katapod.model.inspection import (
    LIVE_BYTES_MAX,
    ContainerFacts,
    Device,
    Disk,
    Hypervisor,
    LiveFacts,
    Missing,
    NetworkFacts,
    Process,
    SandboxFacts,
    SharedMount,
    ShareFacts,
)
from katapod.model.json_text import decode_json
from katapod.model.layout import GUEST_SANDBOX_DIR, GUEST_SHARE, SHARE_TAG, SandboxPaths
from katapod.model.record import SandboxRecord, State
from katapod.observe.device_facts import compared, recorded_devices
from katapod.observe.explain import explain_kernel_parameters
from katapod.observe.netns_facts import network_facts
from katapod.observe.process_facts import is_alive, sandbox_processes
from katapod.plan.root_disk import root_disk_id
from katapod.rpc.http import HttpError, get_http
from katapod.sandbox.lookup import container_name
from katapod.sandbox.shared_volumes import VOLUME_PREFIX
from katapod.sandbox.vmm_link import ask_vmm, vmm_of_record
from katapod.tasks import together

__all__ = ["collect_facts"]

LIVE_LIMIT_S = 8.0  # more than the supervisor takes for those who do not answer
VMM_LIMIT_S = 3.0  # for a VMM that is asked beside its supervisor, and for another process to get done with it
MOUNTS_MAX = 512


async def collect_facts(store: StateStore, sandbox_id: str) -> SandboxFacts:
    """Raises NotFound, KatapodError for a record that cannot be read; all other troubles become part of the facts."""
    record = store.read(sandbox_id)
    paths = store.layout.sandbox(sandbox_id, record.machine_id)
    facts = SandboxFacts(
        sandbox_id=sandbox_id,
        state=record.shown_state.value,
        taken_at=time.time(),
        created_at=record.created_at,
        error=record.error,
        labels=record.labels,
        accelerator=record.accelerator,
        template=record.template,
        vcpus=record.vcpus,
        memory_mib=record.mem_mib,
        containers=tuple(_container(store, record, item.container_id) for item in record.containers),
        cgroups=record.cgroups,
        devices=recorded_devices(record.devices),
        files=_files(paths),
    )
    if record.at_rest:
        why = "it has stopped" if record.state is State.STOPPED else "it was not started yet"
        return replace(facts, missing=(Missing("all that lives", f"{why}: this is its record"),))
    if not supervisor_alive(paths):
        why = "the process that owned it was killed: this is its record"
        return replace(facts, state=State.STOPPED.value, missing=(Missing("all that lives", why),))
    facts = await _add_live(facts, store, record, paths)
    return _recheck(facts, store, record)


async def _add_live(facts: SandboxFacts, store: StateStore, record: SandboxRecord, paths: SandboxPaths) -> SandboxFacts:
    processes = await asyncio.to_thread(sandbox_processes, record.supervisor_pid, record.vmm_pid)
    vmm = next((process for process in processes if process.role == "vmm"), None)
    (live, no_live), (network, no_network) = await together(
        _live(store, record, paths, processes), _network(record, vmm)
    )
    kind = vmm_of_record(record)
    share, no_share = await asyncio.to_thread(_share, store, record, paths, processes)
    missing = [*no_live, *live.missing, *no_network, *no_share]
    state = facts.state
    if vmm is None and record.state is State.CREATING:
        missing.append(Missing("command_line", f"{kind.name} does not run yet: the sandbox is being started"))
    elif vmm is None:
        state = State.STOPPED.value
        missing.append(
            Missing("command_line", f"{kind.name} has ended; its supervisor still holds what is left of the sandbox")
        )
    elif vmm.state == "T":
        missing.append(Missing("hypervisor", f"{kind.name}, process {vmm.pid}, is stopped by a signal (SIGSTOP)"))
    words = vmm.command if vmm is not None else ()
    parameters = kind.kernel_parameters_in(words)
    if not parameters and live.guest is not None:
        parameters = live.guest.kernel_parameters
    hypervisor = _with_origins(live, facts, words)
    devices, not_on_record = compared(facts.devices, hypervisor)
    return replace(
        facts,
        state=state,
        processes=processes,
        command_line=kind.explain(words),
        kernel_parameters=explain_kernel_parameters(parameters),
        devices=devices,
        hypervisor=hypervisor,
        network=network,
        share=share,
        channel=live.channel,
        guest=live.guest,
        missing=(*missing, *not_on_record),
    )


def _recheck(facts: SandboxFacts, store: StateStore, record: SandboxRecord) -> SandboxFacts:
    """Name it if the sandbox ended while it was looked at."""
    try:
        now = store.read(record.sandbox_id)
    except (NotFound, KatapodError):
        now = None
    vmm = next((process.pid for process in facts.processes if process.role == "vmm"), 0)
    lives = not vmm or is_alive(vmm)
    if lives and now is not None and now.state is not State.STOPPED and now.supervisor_pid == record.supervisor_pid:
        return facts
    ended = Missing("all that lives", "it ended while it was looked at: what was found before is shown")
    return replace(facts, state=State.STOPPED.value, missing=(ended, *facts.missing))


def _container(store: StateStore, record: SandboxRecord, container_id: str) -> ContainerFacts:
    item = next(each for each in record.containers if each.container_id == container_id)
    return ContainerFacts(
        container_id=container_id,
        name=container_name(store, record, container_id),
        image=item.image,
        command=item.command,
        state=item.state.value,
        started_at=item.started_at,
        finished_at=item.finished_at,
        exit_code=item.exit_code,
        oom_killed=item.oom_killed,
        error=item.error,
    )


def _files(paths: SandboxPaths) -> dict[str, str]:
    """What is there of the sandbox's files and sockets."""
    named = {
        "record": paths.persist,
        "devices": paths.devices,
        "console_log": paths.console_log,
        "vmm_log": paths.vmm_log,
        "container_log": paths.container_log,
        "control_socket": paths.control_socket,
        "management_socket": paths.management_socket,
        "qmp_socket": paths.vm / "qmp.sock",
        "share": paths.shared,
    }
    return {name: str(path) for name, path in named.items() if path.exists()}


async def _live(
    store: StateStore, record: SandboxRecord, paths: SandboxPaths, processes: tuple[Process, ...]
) -> tuple[LiveFacts, list[Missing]]:
    supervisor = next((each for each in processes if each.pid == record.supervisor_pid), None)
    if supervisor is None or supervisor.state != "T":
        live, why = await _ask_supervisor(paths)
        if live is not None:
            return live, []
    else:
        why = f"its supervisor, process {supervisor.pid}, is stopped by a signal (SIGSTOP)"
    vmm = next((each for each in processes if each.role == "vmm"), None)
    if vmm is None or vmm.state == "T" or record.state is State.CREATING:
        return LiveFacts(), [Missing("hypervisor", why), Missing("guest", why)]
    hypervisor, missing = await _ask_vmm(store, record)
    return LiveFacts(hypervisor=hypervisor), [*missing, Missing("guest", f"{why}, and nobody else can ask its agent")]


async def _ask_vmm(store: StateStore, record: SandboxRecord) -> tuple[Hypervisor | None, list[Missing]]:
    try:
        return await ask_vmm(store, record.sandbox_id, VMM_LIMIT_S)
    except KatapodError as exc:
        return None, [Missing("hypervisor", str(exc))]


async def _ask_supervisor(paths: SandboxPaths) -> tuple[LiveFacts | None, str]:
    """None, and why, if it does not answer."""
    try:
        body = await get_http(str(paths.management_socket), "/inspect", limit_s=LIVE_LIMIT_S, body_max=LIVE_BYTES_MAX)
        return decode_json(body, LiveFacts), ""
    except TimeoutError:
        why = f"its supervisor does not answer within {LIVE_LIMIT_S:g} s"
    except HttpError as exc:
        why = "its supervisor is older than this program, and does not tell" if exc.status == 404 else str(exc)
    except (FileNotFoundError, ConnectionRefusedError):
        why = "its supervisor does not answer: the sandbox is being started, or ends"
    except OSError as exc:
        why = f"its supervisor cannot be asked: {exc.strerror or exc}"
    except msgspec.DecodeError as exc:
        why = f"its supervisor says what is not understood: {exc}"
    return None, why


async def _network(record: SandboxRecord, vmm: Process | None) -> tuple[NetworkFacts | None, list[Missing]]:
    if record.network is None:
        return None, []
    netns = Path(record.network.netns)
    try:
        if os.stat(netns).st_ino != record.network.inode:
            raise FileNotFoundError
    except OSError:
        if vmm is None:
            return None, [Missing("network", f"there is no network namespace {netns} any more")]
        netns = Path(f"/proc/{vmm.pid}/ns/net")  # its name is gone, or not ours to see
    outside = [
        ("in the network namespace of the supervisor", Path(f"/proc/{record.supervisor_pid}/ns/net")),
        ("on the host", Path("/proc/1/ns/net")),
    ]
    return await network_facts(netns, record.network, outside)


def _share(
    store: StateStore, record: SandboxRecord, paths: SandboxPaths, processes: tuple[Process, ...]
) -> tuple[ShareFacts | None, list[Missing]]:
    """What is mounted in the shared directory, as the supervisor sees it; None if there is none."""
    if record.devices.share is None:
        return None, []
    try:
        below = f"{paths.mounts}/"
        found = [
            (each.point.removeprefix(below), each)
            for each in read_mounts(record.supervisor_pid)
            if each.point.startswith(below)
        ]
    except OSError as exc:
        return None, [Missing("share", f"cannot read the supervisor's mounts: {exc.strerror}")]
    wanted = _wanted_mounts(record, paths)
    mounts = []
    for name, mount in list(dict(found).items())[:MOUNTS_MAX]:
        mounts += [
            SharedMount(
                name=name,
                host=host or mount.fstype,
                fstype=mount.fstype,
                read_only=mount.read_only,
                guest=f"{GUEST_SHARE}/{name}",
                container=container,
                destination=destination,
            )
            for container, host, destination in _origins(name, wanted)
        ]
    daemons = [process for process in processes if process.role == "virtiofsd"]
    serving = max(daemons, key=lambda process: process.cpu_seconds, default=None)
    facts = ShareFacts(
        tag=SHARE_TAG,
        directory=str(paths.shared),
        guest=GUEST_SHARE,
        socket=str(paths.vm / "vhost-fs.sock"),
        virtiofsd=serving.pid if serving is not None else 0,
        mounts=tuple(mounts),
    )
    return facts, []


def _wanted_mounts(record: SandboxRecord, paths: SandboxPaths) -> dict[str, list[tuple[str, str]]]:
    """(source, destination) of each container's mounts, and of its root file system; from its saved spec."""
    wanted: dict[str, list[tuple[str, str]]] = {}
    for item in record.containers:
        try:
            spec = json.loads(paths.spec(item.container_id).read_bytes())
            mounts = [(str(one.get("source", "")), str(one["destination"])) for one in spec.get("mounts") or ()]
            mounts.append((str((spec.get("root") or {}).get("path", "")), "/"))
        except (OSError, ValueError, KeyError, AttributeError):
            mounts = []
        wanted[item.container_id] = mounts
    return wanted


def _origins(name: str, wanted: dict[str, list[tuple[str, str]]]) -> list[tuple[str, str, str]]:
    """(container, path on the host, destination) of an entry of the shared directory, for each of its users: containers
    that have one source have it by one entry, which is called after the first one's destination."""
    container_id, slash, rest = name.partition("/")
    if slash and rest == "rootfs":
        mounts = wanted.get(container_id, [])
        return [(container_id, next((source for source, where in mounts if where == "/"), ""), "/")]
    base = name[len(VOLUME_PREFIX) + 17 :]  # after 16 hexadecimal digits and a dash
    sources = [
        source
        for mounts in wanted.values()
        for source, destination in mounts
        if name.startswith(VOLUME_PREFIX)
        and source.startswith("/")
        and os.path.basename(destination.rstrip("/")) == base
    ]
    users = []
    for container_id, mounts in wanted.items():
        for mount in [mount for mount in mounts if mount[0] in sources[:1]]:
            mounts.remove(mount)  # the next entry of that name is another's
            users.append((container_id, *mount))
    return users or [("", "", "")]


def _with_origins(live: LiveFacts, facts: SandboxFacts, words: tuple[str, ...]) -> Hypervisor | None:
    """Devices with where they come from, and disks with where the guest has them."""
    hypervisor = live.hypervisor
    if hypervisor is None:
        return None
    cold = {part.removeprefix("id=") for word in words for part in word.split(",") if part.startswith("id=")}
    devices = tuple(replace(device, origin=_origin_of(device, cold)) for device in hypervisor.devices)
    targets = {mount.target for mount in live.guest.mounts} if live.guest is not None else set()
    disks = tuple(_with_mount(disk, facts, targets) for disk in hypervisor.disks)
    return replace(hypervisor, devices=devices, disks=disks)


def _origin_of(device: Device, cold: set[str]) -> str:
    """The VMM keeps no list of which devices it was started with. One without a name of its own is the machine's, or
    stands on the command line without an id."""
    if not device.device_id:
        return "machine or command line"
    return "command line" if device.device_id in cold else "hot-plug"


def _with_mount(disk: Disk, facts: SandboxFacts, targets: set[str]) -> Disk:
    for item in facts.containers:
        target = f"{GUEST_SANDBOX_DIR}/layers/{item.container_id}"
        if disk.device_id == f"virtio-{root_disk_id(item.container_id)}" and target in targets:
            return replace(disk, guest_mount=target)
    return disk
