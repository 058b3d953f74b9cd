"""The life of the agent: start, channels, end. As PID 1 it is the guest's init as well."""

from __future__ import annotations

import os
import signal
import sys

from katapod.agent import channel, log, methods
from katapod.agent.loop import Loop
from katapod.agent.options import Options, UsageError, parse_arguments
from katapod.agent.sandbox import Agent
from katapod.agent.server import Server

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

__all__ = ["run"]

AGENT_PORT = "katapod.agent.0"
AGENT_VSOCK = "vsock://-1:1024"
PORT_WAIT_S, PORT_POLL_S = 10.0, 0.005
FIRST_ANSWER_S = 0.2
CONSOLE_PAUSE_S = 1.0
VSOCK_DEVICE = "0x0013"  # virtio device id of vsock
OOM_SCORE = "-997"
NICE = -15
GUEST_VARIABLE = "KATAPOD_GUEST"  # set by kata-agent.service: runs in a guest, not on a host


class Program:
    """The agent's parts, assembled for one run."""

    def __init__(self, loop: Loop, options: Options, is_init: bool) -> None:
        self.loop = loop
        self.options = options
        self.agent = Agent(loop, options, is_init)
        self.server = Server(loop, self.find)
        self.late_done = not is_init

    def find(self, service: str, method: str) -> Callable[[Any], Coroutine[Any, None, Any]] | None:
        if service != "grpc.Health":
            self.finish_start()
        function = methods.load_method(service, method)
        if function is None:
            return None
        return lambda request: function(self.agent, request)

    def finish_start(self) -> None:
        """The part of the start that need not precede Health.Check."""
        if self.late_done:
            return
        self.late_done = True
        from katapod.agent import init

        self.keep_limits()
        init.late()

    def keep_limits(self) -> None:
        """In a guest: record the kernel's limits at boot, and set our own."""
        from katapod.agent.limits import Limits, open_files_limit
        from katapod.agent.room import Room

        self.agent.limits = Limits()
        self.agent.room = Room(self.options.processes_max)
        open_files_limit()

    async def finish_start_in_turn(self) -> None:
        """The same in the background, then load the modules that the first container needs."""
        await self.loop.wait_any([self.server.first_answer], FIRST_ANSWER_S)
        self.finish_start()
        from katapod.agent import init

        for name in methods.MODULES:
            await self.loop.turn()
            methods.load_module(name)
        init.forget_files()
        log.info(f"ready, {_uptime()} s after the kernel's start, {_resident_kib()} KiB resident")

    async def open_channels(self) -> None:
        """Serve on the configured address, else on the available channel. Raises OSError, ValueError."""
        address = self.options.server_addr
        if not address and channel.find_port(AGENT_PORT) is None and _has_vsock():
            self.finish_start()  # loads the vsock modules
            address = AGENT_VSOCK
        if address:
            self.serve_address(address)
            return
        path = await self.wait_for_port(AGENT_PORT)
        self.server.reset_ids = True
        self.agent.tasks.spawn(
            "port", channel.serve_port(self.loop, path, self.server.serve, lambda: self.opened(path))
        )

    def serve_address(self, address: str) -> None:
        listener = channel.Listener(self.loop, address)
        self.agent.tasks.spawn("listener", channel.listen(self.loop, listener, self.server.serve))
        self.opened(address)

    async def wait_for_port(self, name: str) -> str:
        """Raises OSError if there is no such port after PORT_WAIT_S."""
        for _ in range(int(PORT_WAIT_S / PORT_POLL_S)):
            path = channel.find_port(name)
            if path is not None:
                return path
            await self.loop.sleep(PORT_POLL_S)
        raise OSError(19, f"no virtio-serial port is named {name}, and there is no vsock")

    def opened(self, where: str) -> None:
        log.info(f"version {_version()} serves on {where}, {_uptime()} s after the kernel's start")

    async def keep_console(self) -> None:
        """Keep the debug console's process running: the OOM killer may end it."""
        from katapod.agent.console import fork_console

        while True:
            await self.loop.child_exit(fork_console(self.options, _has_vsock))
            log.warning("the debug console has ended; restarting it")
            await self.loop.sleep(CONSOLE_PAUSE_S)

    async def run(self) -> None:
        def stop(number: int) -> None:
            if number in (signal.SIGTERM, signal.SIGINT):
                self.agent.finished.set()

        self.loop.on_signal = stop
        if os.environ.get(GUEST_VARIABLE) == "systemd":
            self.keep_limits()
        if self.options.debug_console:
            self.agent.tasks.spawn("console", self.keep_console())
        await self.open_channels()
        if self.agent.is_init:
            self.agent.tasks.spawn("start", self.finish_start_in_turn())
        await self.agent.finished
        # the response to DestroySandbox is written in the same turn; give the host a moment to read it
        await self.loop.sleep(0.05)
        self.agent.tasks.cancel()


def _version() -> str:
    import katapod

    return katapod.__version__


def _uptime() -> str:
    try:
        with open("/proc/uptime") as handle:
            return handle.read().split()[0]
    except OSError:
        return "?"


def _resident_kib() -> int:
    with open("/proc/self/statm") as handle:
        return int(handle.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def _has_vsock() -> bool:
    directory = "/sys/bus/virtio/devices"
    try:
        for name in os.listdir(directory):
            with open(f"{directory}/{name}/device") as handle:
                if handle.read().strip() == VSOCK_DEVICE:
                    return True
    except FileNotFoundError:
        return os.path.exists("/dev/vsock")
    return False


def _cmdline() -> str:
    with open("/proc/cmdline") as handle:
        return handle.read()


def _prepare_service() -> None:
    """Not PID 1: set up what init would have set up."""
    from katapod.kernel.process import become_subreaper

    become_subreaper()
    try:
        with open("/proc/self/oom_score_adj", "w") as handle:
            handle.write(OOM_SCORE)
    except PermissionError:
        log.debug("not allowed to lower the OOM score")


def _come_first() -> None:
    """A higher priority for the agent than for what it starts, which gets the default one. Source: sched(7)."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
        os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    except PermissionError:
        log.debug("not allowed to raise the priority")


def _serve(options: Options, is_init: bool) -> None:
    log.set_level(options.log_level)
    if options.fixed_addresses:
        from katapod.agent.program import fix_addresses

        fix_addresses()
    _come_first()
    loop = Loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)  # the loop learns of them through its wakeup pipe
    program = Program(loop, options, is_init)
    try:
        loop.run(program.run())
    finally:
        loop.close()


def _run_as_init() -> None:
    """Never returns."""
    from katapod.agent import init
    from katapod.kernel.system import power_off

    reason = ""
    try:
        init.early()
        log.info(f"started, {_uptime()} s after the kernel's start")
        options = parse_arguments([], _cmdline())
        if options.prove_token:
            from katapod.agent.prove import prove

            prove(options.prove_token)
        else:
            _serve(options, is_init=True)
            log.info("powering off")
    except BaseException as exc:
        reason = f"{type(exc).__name__}: {exc}" + "".join(f" ({n})" for n in getattr(exc, "__notes__", ()))
        if isinstance(exc, Exception):
            _show_traceback(exc)
    if reason:
        init.die(reason)
    os.sync()
    power_off()


def _run_under_systemd() -> None:
    """In the systemd flavour of the guest image, kata-agent.service powers off when we exit."""
    from katapod.agent import init

    options = parse_arguments(sys.argv[1:], _cmdline())
    _prepare_service()
    init.under_systemd()
    if options.prove_token:
        from katapod.agent.prove import prove

        prove(options.prove_token, is_init=False)
        return
    _serve(options, is_init=False)
    os.sync()


def _show_traceback(exc: BaseException) -> None:
    trace = exc.__traceback__
    while trace is not None:
        log.error(f"at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
        trace = trace.tb_next


def run() -> None:
    """As PID 1, always power off at the end."""
    if os.getpid() == 1:
        _run_as_init()
        return
    try:
        if os.environ.get(GUEST_VARIABLE) == "systemd":
            _run_under_systemd()
            return
        options = parse_arguments(sys.argv[1:], _cmdline())
        _prepare_service()
        _serve(options, is_init=False)
    except (UsageError, OSError, ValueError) as exc:
        log.error(str(exc))
        sys.exit(1)
