"""The agent's state, and the calls about the sandbox as a whole: create, rename, tmpfs sizes. Its end: teardown.py."""

from __future__ import annotations

import os

from katapod.agent import log
from katapod.agent.automounts import Automounts
from katapod.agent.loop import Future, Lock, Loop, Tasks, Turns
from katapod.agent.paths import BASE, RESOLV_CONF, SANDBOX, SHARED
from katapod.rpc.status import RpcError, StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapod.agent.connections import Connections
    from katapod.agent.container import Container
    from katapod.agent.limits import Limits
    from katapod.agent.names import Names
    from katapod.agent.oom import OomWatch
    from katapod.agent.options import Options
    from katapod.agent.room import Room
    from katapod.agent.storage import Storages
    from katapod.rpc.pb import agent_pb2, katapod_pb2

__all__ = ["Agent", "create_sandbox", "rename_sandbox", "update_ephemeral_mounts"]

HOSTNAME_MAX = 64  # bytes, of Linux's utsname
LAUNCHES_PER_CPU = 2
"""Concurrent launches: one can run while another waits for the disk. More would not finish sooner, and would take CPU
from the agent."""
ETC_RESOLV_CONF = "/etc/resolv.conf"
GUEST_DIRECTORY = "/etc/katapod"  # exists only in a guest image


class Agent:
    """The state that the calls share. `containers`, by id, hold their own resources."""

    def __init__(self, loop: Loop, options: Options, is_init: bool) -> None:
        self.loop = loop
        self.options = options
        self.is_init = is_init
        self.tasks = Tasks(loop, "agent")
        self.finished = Future()  # set when the sandbox is destroyed: main exits
        self.containers: dict[str, Container] = {}
        self.create_lock = Lock()
        self.launches = Turns(lambda: LAUNCHES_PER_CPU * self.cpus)
        self.sandbox_id = ""
        self.automounts = Automounts()
        self.shared_namespaces: dict[str, str] = {}  # namespace type to the bind mount that keeps it
        self.sandbox_pidns = False
        self.hooks: dict[str, list[str]] = {}  # of every container, from the guest image
        self.scrapes = 0
        self.cpus = os.cpu_count() or 1  # online at the last check
        self.limits: Limits | None = None  # in a guest: the kernel's, adapted to its memory
        self.room: Room | None = None  # in a guest: what containers leave of it
        self._storages: Storages | None = None
        self._oom: OomWatch | None = None
        self._connections: Connections | None = None
        self._names: Names | None = None

    @property
    def storages(self) -> Storages:
        if self._storages is None:
            from katapod.agent.storage import Storages

            self._storages = Storages(self.loop, self.options.hotplug_timeout_s)
        return self._storages

    @property
    def oom(self) -> OomWatch:
        if self._oom is None:
            from katapod.agent.oom import OomWatch

            self._oom = OomWatch(self.loop)
        return self._oom

    @property
    def connections(self) -> Connections:
        if self._connections is None:
            from katapod.agent.connections import Connections

            self._connections = Connections(self.loop)
        return self._connections

    @property
    def names(self) -> Names:
        if self._names is None:
            from katapod.agent.names import Names

            self._names = Names(self.loop)
        return self._names


async def create_sandbox(agent: Agent, request: agent_pb2.CreateSandboxRequest) -> None:
    from katapod.agent.namespaces import drop_namespaces, share_namespaces

    if agent.sandbox_id:
        raise RpcError(StatusCode.ALREADY_EXISTS, f"the sandbox already exists: {agent.sandbox_id}")
    if request.kernel_modules:
        from katapod.agent.modules import load_module

        for module in request.kernel_modules:
            await load_module(agent.loop, module.name, list(module.parameters))
    for directory in (BASE, SANDBOX, SHARED):
        os.makedirs(directory, mode=0o755, exist_ok=True)
    hostname = _fit_hostname(request.hostname)
    await agent.storages.add(request.storages, "")
    try:
        share_namespaces(agent.shared_namespaces, hostname)
        if request.dns:
            _write_dns(list(request.dns))
    except BaseException:
        drop_namespaces(agent.shared_namespaces)
        agent.storages.release_all()
        raise
    if request.guest_hook_path:
        from katapod.agent.hooks import find_hooks

        agent.hooks = find_hooks(request.guest_hook_path)
        if not agent.hooks:
            log.warning(f"no guest hooks in {request.guest_hook_path}")
    agent.sandbox_pidns = request.sandbox_pidns
    agent.sandbox_id = request.sandbox_id or "sandbox"
    log.info(f"sandbox {agent.sandbox_id} created")


async def rename_sandbox(agent: Agent, request: katapod_pb2.RenameRequest) -> katapod_pb2.RenameResponse:
    """Set the names of a sandbox that the host's pool has created in advance."""
    import _socket

    from katapod.rpc.pb import katapod_pb2

    if not agent.sandbox_id or agent.containers:
        raise RpcError(StatusCode.FAILED_PRECONDITION, "cannot rename: there is no sandbox, or it has containers")
    if request.hostname:
        _socket.sethostname(_fit_hostname(request.hostname))  # we are in the sandbox's uts namespace
    agent.sandbox_id = request.sandbox_id or agent.sandbox_id
    log.info(f"sandbox renamed to {agent.sandbox_id}")
    return katapod_pb2.RenameResponse()


def _fit_hostname(name: str) -> str:
    return name.encode()[:HOSTNAME_MAX].decode(errors="ignore")


def _write_dns(lines: list[str]) -> None:
    """For the guest itself, where programs look for it. Raises OSError."""
    from katapod.kernel.mount import MS_BIND, mount

    with open(RESOLV_CONF, "w") as handle:
        handle.write("\n".join(lines) + "\n")
    if not os.path.isdir(GUEST_DIRECTORY):
        return  # an agent under test on a host
    os.close(os.open(ETC_RESOLV_CONF, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
    mount(RESOLV_CONF, ETC_RESOLV_CONF, None, MS_BIND)


async def update_ephemeral_mounts(agent: Agent, request: agent_pb2.UpdateEphemeralMountsRequest) -> None:
    """Give tmpfs mounts another size."""
    from katapod.kernel.mount import MS_REMOUNT, mount, parse_options

    for storage in request.storages:
        if storage.driver != "ephemeral":
            continue
        flags, data = parse_options(o for o in storage.options if not o.startswith("fsgid="))
        mount("tmpfs", storage.mount_point, "tmpfs", flags | MS_REMOUNT, data)
