"""The guest as a machine: health, versions, CPUs and memory put online, clock, random numbers, swap."""

from __future__ import annotations

import os
import struct

import katapod
from katapod.agent import log, trace
from katapod.rpc.features import FEATURES
from katapod.rpc.pb import agent_pb2, health_pb2
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.agent.limits import Limits
    from katapod.agent.sandbox import Agent
    from katapod.rpc.pb import katapod_pb2

GRPC_VERSION = "0.0.1"  # of the agent protocol
CPU_DIRECTORY = "/sys/devices/system/cpu"
MEMORY_DIRECTORY = "/sys/devices/system/memory"
ONLINE_TRIES, ONLINE_PAUSE_S = 100, 0.05
RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207
SEED_MAX = 4096  # bytes
MACHINE_ID = "/etc/machine-id"
CLOCK_REALTIME = 0
CLOCK_SOURCE = "/sys/devices/system/clocksource/clocksource0"
CLOCK_SOURCES = ("kvm-clock", "hpet", "acpi_pm")  # the best first


async def check(agent: Agent, request: health_pb2.CheckRequest) -> health_pb2.HealthCheckResponse:
    return health_pb2.HealthCheckResponse(status="SERVING")


async def version(agent: Agent, request: health_pb2.CheckRequest) -> health_pb2.VersionCheckResponse:
    return health_pb2.VersionCheckResponse(grpc_version=GRPC_VERSION, agent_version=katapod.__version__)


async def get_guest_details(agent: Agent, request: agent_pb2.GuestDetailsRequest) -> agent_pb2.GuestDetailsResponse:
    from katapod.agent import devices, storage

    details = agent_pb2.AgentDetails(
        version=katapod.__version__,
        init_daemon=agent.is_init,
        device_handlers=devices.HANDLERS,
        storage_handlers=storage.DRIVERS,
        supports_seccomp=True,
        extra_features=FEATURES,
    )
    response = agent_pb2.GuestDetailsResponse(agent_details=details)
    if request.mem_block_size:
        try:
            with open(f"{MEMORY_DIRECTORY}/block_size_bytes") as handle:
                response.mem_block_size_bytes = int(handle.read(), 16)
        except FileNotFoundError:
            response.mem_block_size_bytes = 0  # the kernel lacks memory hot-plug
    if request.mem_hotplug_probe:
        response.support_mem_hotplug_probe = os.path.exists(f"{MEMORY_DIRECTORY}/probe")
    return response


def _set_online(directory: str, prefix: str, most: int | None = None) -> int:
    """Bring offline CPUs or memory blocks online, in order, until `most` are; returns how many are online."""
    online = 0
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return 0
    numbers = sorted(
        int(name[len(prefix) :]) for name in names if name.startswith(prefix) and name[len(prefix) :].isdigit()
    )
    for number in numbers:
        if online == most:
            break
        path = f"{directory}/{prefix}{number}/online"
        try:
            with open(path) as handle:
                state = handle.read(1)
            if state == "0":
                with open(path, "w") as handle:
                    handle.write("1")
            online += 1
        except FileNotFoundError:
            online += 1  # cpu0 may have no such file: it is always online
        except OSError as exc:
            log.warning(f"cannot put {prefix}{number} online: {exc.strerror}")
    return online


async def _put_online(agent: Agent, added: int, cpu_only: bool) -> bool:
    """Wait until `added` CPUs more than before are online, whatever brought them online.

    No more than that: the kernel may list CPUs that have not been plugged in, and would wait for them.
    """
    wanted = agent.cpus + added
    for attempt in range(ONLINE_TRIES):
        if attempt:
            await agent.loop.sleep(ONLINE_PAUSE_S)
        agent.cpus = _set_online(CPU_DIRECTORY, "cpu", wanted)
        if not cpu_only:
            _set_online(MEMORY_DIRECTORY, "memory")
        if agent.cpus >= wanted:
            return True
    log.warning(f"fewer than {wanted} CPUs are online")
    return False


async def _follow_memory(agent: Agent, limits: Limits) -> None:
    """Plugged memory comes online by itself, a moment later."""
    for _ in range(ONLINE_TRIES):
        if limits.follow():
            if agent.room is not None and agent.containers:
                agent.room.follow(agent.cpus)
            return
        await agent.loop.sleep(ONLINE_PAUSE_S)


async def online_cpu_mem(agent: Agent, request: agent_pb2.OnlineCPUMemRequest) -> None:
    """A new CPU or memory block appears some time after it was plugged in, so this waits for it: within the call if the
    caller says so, else in the background."""
    if agent.limits is not None and not request.cpu_only:
        agent.tasks.spawn("limits", _follow_memory(agent, agent.limits))
    work = _put_online(agent, request.nb_cpus, request.cpu_only)
    if not request.wait:
        agent.tasks.spawn("online", work)
    elif not await work:
        raise RpcError(
            StatusCode.DEADLINE_EXCEEDED, f"cannot put {request.nb_cpus} CPUs online: they did not appear in time"
        )


async def mem_hotplug_by_probe(agent: Agent, request: agent_pb2.MemHotplugByProbeRequest) -> None:
    for address in request.memHotplugProbeAddr:
        with open(f"{MEMORY_DIRECTORY}/probe", "w") as handle:
            handle.write(f"{address:#x}")


async def reseed_random_dev(agent: Agent, request: agent_pb2.ReseedRandomDevRequest) -> None:
    """Credit the host's bytes to the kernel's entropy pool and reseed at once: a clone must not continue with the
    random state of its template."""
    import fcntl

    data = bytes(request.data)
    if not 0 < len(data) <= SEED_MAX:
        raise RpcError(StatusCode.INVALID_ARGUMENT, f"cannot reseed with {len(data)} bytes: use 1 to {SEED_MAX}")
    trace.clear()
    with open("/dev/random", "wb", buffering=0) as device:
        fcntl.ioctl(device, RNDADDENTROPY, struct.pack("ii", len(data) * 8, len(data)) + data)
        fcntl.ioctl(device, RNDRESEEDCRNG)
    _renew_machine_id()


def _renew_machine_id() -> None:
    """Replace the machine id, which a clone has from its template. Only guests with systemd have one, see
    machine-id(5); where the agent is a program on a host, that host's id must not be changed."""
    if os.environ.get("KATAPOD_GUEST") == "systemd":
        with open(MACHINE_ID, "w") as handle:
            handle.write(os.urandom(16).hex() + "\n")


async def set_guest_date_time(agent: Agent, request: agent_pb2.SetGuestDateTimeRequest) -> None:
    import time

    time.clock_settime_ns(CLOCK_REALTIME, (request.Sec * 1_000_000 + request.Usec) * 1000)


async def clock(agent: Agent, request: katapod_pb2.ClockRequest) -> katapod_pb2.ClockResponse:
    """Adjust the clock as the host asks, which has compared it with its own. Raises OSError."""
    import time

    from katapod.rpc.pb import katapod_pb2

    if request.other_source:
        _leave_clock_source()
    if request.step_ns:
        time.clock_settime_ns(CLOCK_REALTIME, time.time_ns() + request.step_ns)
    if request.slew_ns:
        from katapod.kernel.clock import slew_clock

        slew_clock(request.slew_ns // 1000)
    return katapod_pb2.ClockResponse(time_ns=time.time_ns())


def _leave_clock_source() -> None:
    """If the kernel measured the TSC's frequency while the host was busy, the clock runs at a wrong rate permanently:
    `tsc=reliable` keeps the kernel from noticing. The other clock sources have a known frequency."""
    with open(f"{CLOCK_SOURCE}/available_clocksource") as handle:
        found = handle.read().split()
    for name in CLOCK_SOURCES:
        if name in found:
            with open(f"{CLOCK_SOURCE}/current_clocksource", "w") as handle:
                handle.write(name)
            log.warning(f"switched to clock source {name}: the previous one had a wrong rate")
            return


async def add_swap_path(agent: Agent, request: agent_pb2.AddSwapPathRequest) -> None:
    from katapod.kernel.system import swap_on

    swap_on(request.path)


async def add_swap(agent: Agent, request: agent_pb2.AddSwapRequest) -> None:
    from katapod.agent.devices import block_device
    from katapod.kernel.system import swap_on

    path = "/".join(f"{slot:02x}" for slot in request.PCIPath)
    swap_on(await block_device(agent.loop, path, agent.options.hotplug_timeout_s))
