"""The agent's settings: kernel command line (agent.*, katapod.*), or program arguments outside a guest."""

from __future__ import annotations

import os

__all__ = ["Options", "UsageError", "parse_arguments", "parse_cmdline"]


class UsageError(Exception):
    """Unknown program arguments."""


class Options:
    """Source of names and defaults: Kata Containers' agent parameters."""

    __slots__ = (
        "container_pipe_size_bytes",
        "debug_console",
        "debug_console_vport",
        "fixed_addresses",
        "hotplug_timeout_s",
        "log_level",
        "processes_max",
        "prove_token",
        "server_addr",
    )

    def __init__(self) -> None:
        self.log_level = "info"
        self.debug_console = False
        self.debug_console_vport = 1026
        self.server_addr = ""  # empty: the virtio-serial port, or vsock://-1:1024 where there is a vsock
        self.hotplug_timeout_s = 3.0
        self.container_pipe_size_bytes = 0  # 0: the kernel's default
        self.fixed_addresses = False  # of the programs that the agent runs: program.py
        self.processes_max = 0  # that the host lets the guest have; 0: as many as the guest's kernel
        self.prove_token = ""


def _positive(text: str, default: int) -> int:
    return int(text) if text.isascii() and text.isdigit() and int(text) > 0 else default


def _flag(text: str) -> bool:
    return text.lower() not in ("0", "false", "no", "off")


def parse_cmdline(cmdline: str) -> Options:
    """Parse /proc/cmdline. Unknown keys and invalid values are ignored."""
    options = Options()
    for word in cmdline.split():
        key, _, value = word.partition("=")
        if key == "agent.log":
            options.log_level = value
        elif key == "agent.debug_console":
            options.debug_console = _flag(value)
        elif key == "agent.debug_console_vport":
            options.debug_console_vport = _positive(value, options.debug_console_vport)
        elif key == "agent.server_addr":
            options.server_addr = value
        elif key == "agent.hotplug_timeout":
            options.hotplug_timeout_s = float(_positive(value, int(options.hotplug_timeout_s)))
        elif key == "agent.container_pipe_size":
            options.container_pipe_size_bytes = _positive(value, 0)
        elif key == "katapod.fixed_addresses":
            options.fixed_addresses = _flag(value)
        elif key == "katapod.processes":
            options.processes_max = _positive(value, 0)
        elif key == "katapod.prove":
            options.prove_token = value[:64]
    return options


def parse_arguments(arguments: list[str], cmdline: str) -> Options:
    """Settings from the kernel command line, then environment, then program arguments.

    Raises UsageError.
    """
    options = parse_cmdline(cmdline)
    options.server_addr = os.environ.get("KATA_AGENT_SERVER_ADDR", options.server_addr)
    options.log_level = os.environ.get("KATA_AGENT_LOG_LEVEL", options.log_level)
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--listen" and rest:
            options.server_addr = rest.pop(0)
        elif word == "--log-level" and rest:
            options.log_level = rest.pop(0)
        elif word != "init":
            raise UsageError(f"unknown argument {word!r}: usage: kata-agent [--listen ADDRESS] [--log-level LEVEL]")
    return options
