"""The functions that implement the calls. Modules are imported at the first call that needs them, so that Health.Check
can be answered before most of the agent is loaded."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    Method = Callable[[Any, Any], Coroutine[Any, None, Any]]

__all__ = ["METHODS", "MODULES", "load_method"]

METHODS = {
    "grpc.Health/Check": "guest.check",
    "grpc.Health/Version": "guest.version",
    "grpc.AgentService/CreateSandbox": "sandbox.create_sandbox",
    "grpc.AgentService/DestroySandbox": "teardown.destroy_sandbox",
    "grpc.AgentService/UpdateEphemeralMounts": "sandbox.update_ephemeral_mounts",
    "grpc.AgentService/CreateContainer": "containers.create_container",
    "grpc.AgentService/StartContainer": "containers.start_container",
    "grpc.AgentService/RemoveContainer": "containers.remove_container",
    "grpc.AgentService/ExecProcess": "containers.exec_process",
    "grpc.AgentService/SignalProcess": "containers.signal_process",
    "grpc.AgentService/WaitProcess": "containers.wait_process",
    "grpc.AgentService/UpdateContainer": "containers.update_container",
    "grpc.AgentService/PauseContainer": "containers.pause_container",
    "grpc.AgentService/ResumeContainer": "containers.resume_container",
    "grpc.AgentService/WriteStdin": "containers.write_stream",
    "grpc.AgentService/ReadStdout": "containers.read_stdout",
    "grpc.AgentService/ReadStderr": "containers.read_stderr",
    "grpc.AgentService/CloseStdin": "containers.close_stdin",
    "grpc.AgentService/TtyWinResize": "containers.resize_terminal",
    "grpc.AgentService/GetOOMEvent": "containers.get_oom_event",
    "grpc.AgentService/StatsContainer": "stats.stats_container",
    "grpc.AgentService/GetMetrics": "metrics.get_metrics",
    "grpc.AgentService/GetVolumeStats": "stats.get_volume_stats",
    "grpc.AgentService/ResizeVolume": "volumes.resize_volume",
    "grpc.AgentService/OnlineCPUMem": "guest.online_cpu_mem",
    "grpc.AgentService/GetGuestDetails": "guest.get_guest_details",
    "grpc.AgentService/MemHotplugByProbe": "guest.mem_hotplug_by_probe",
    "grpc.AgentService/ReseedRandomDev": "guest.reseed_random_dev",
    "grpc.AgentService/SetGuestDateTime": "guest.set_guest_date_time",
    "grpc.AgentService/AddSwap": "guest.add_swap",
    "grpc.AgentService/AddSwapPath": "guest.add_swap_path",
    "grpc.AgentService/CopyFile": "files.copy_file",
    "grpc.AgentService/GetDiagnosticData": "files.get_diagnostic_data",
    "grpc.AgentService/UpdateInterface": "network.update_interface",
    "grpc.AgentService/UpdateRoutes": "network.update_routes",
    "grpc.AgentService/ListInterfaces": "network.list_interfaces",
    "grpc.AgentService/ListRoutes": "network.list_routes",
    "grpc.AgentService/AddARPNeighbors": "network.add_arp_neighbors",
    "grpc.AgentService/GetIPTables": "iptables.get_iptables",
    "grpc.AgentService/SetIPTables": "iptables.set_iptables",
    "katapod.Guest/Settle": "template.settle",
    "katapod.Guest/Trace": "template.read_trace",
    "katapod.Guest/Rename": "sandbox.rename_sandbox",
    "katapod.Guest/Processes": "stats.list_processes",
    "katapod.Guest/Connect": "connections.connect",
    "katapod.Guest/Receive": "connections.receive",
    "katapod.Guest/Send": "connections.send",
    "katapod.Guest/Disconnect": "connections.disconnect",
    "katapod.Guest/Clock": "guest.clock",
    "katapod.Guest/LetGo": "letting_go.let_go",
    "katapod.Guest/TakeNames": "names.take_names",
    "katapod.Guest/NextQuery": "names.next_query",
    "katapod.Guest/AnswerQuery": "names.answer_query",
    "katapod.Inspection/Inspect": "inspection.inspect_guest",
}
MODULES = ("containers", "storage", "stats", "files", "network")  # loaded when idle


def load_module(name: str) -> Any:
    return getattr(__import__(f"katapod.agent.{name}").agent, name)


def load_method(service: str, method: str) -> Method | None:
    """The function of a call, taking the Agent and the request; None if there is none."""
    entry = METHODS.get(f"{service}/{method}")
    if entry is None:
        return None
    module, _, function = entry.partition(".")
    found: Method = getattr(load_module(module), function)
    return found
