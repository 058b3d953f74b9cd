"""The node's running containerd: found by its socket, asked for its version, told to start again.

It is started again by systemd, if it is a unit's. Elsewhere it is ended, and whoever started it starts it once more:
that is how every supervisor of daemons does it. Containers live on: they are their shims' children.
Source: unix(7), SO_PEERCRED: the process that called listen(2).
"""

import os
import re
import signal
import socket
import struct
from pathlib import Path

import msgspec

from katapod.operator.node.errors import NodeError
from katapod.operator.node.host import Host

__all__ = ["DEFAULT_SOCKET", "Engine", "find_engine", "restart_engine"]

DEFAULT_SOCKET = "/run/containerd/containerd.sock"
DEFAULT_CONFIG = "/etc/containerd/config.toml"
OLDEST = (1, 6)
RESTART_LIMIT_S = 45.0  # twice, with the way back, within two minutes
CREDENTIALS = struct.Struct("iII")  # struct ucred
SELF_WRITTEN = {"k3s": "k3s", "rke2": "rke2", "k0s": "k0s", "microk8s": "microk8s"}
"""Distributions whose containerd has its configuration from a template of theirs."""


class Engine(msgspec.Struct, frozen=True):
    """A containerd: paths are the node's."""

    pid: int
    program: str
    version: str
    config: str
    socket: str
    unit: str  # of systemd, or empty

    @property
    def ctr(self) -> list[str]:
        return [str(Path(self.program).with_name("ctr")), "--address", self.socket]

    @property
    def title(self) -> str:
        return f"containerd {self.version}"


def find_engine(host: Host, socket_path: str = DEFAULT_SOCKET) -> Engine:
    """Raises NodeError if none serves there, or if it is one that we cannot configure."""
    pid = _listener(host.path(socket_path), socket_path)
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    program = _program(pid)
    for mark, name in SELF_WRITTEN.items():
        if f"/{mark}/" in program or any(f"/{mark}/" in word for word in words):
            raise NodeError(
                f"the node's containerd is {name}'s, which writes its configuration itself: not supported yet"
            )
    host.join(pid)
    said = host.run(program, "--version").stdout
    match = re.search(r"\bv?((\d+)\.(\d+)[^\s]*)", said)
    if not match or "containerd" not in said:
        raise NodeError(f"{socket_path} is not containerd's: {program} says {said.strip()!r}")
    if (int(match[2]), int(match[3])) < OLDEST:
        raise NodeError(f"the node has containerd {match[1]}; {OLDEST[0]}.{OLDEST[1]} is the oldest that works")
    return Engine(pid, program, match[1], _option(words, "--config", "-c") or DEFAULT_CONFIG, socket_path, _unit(pid))


def restart_engine(host: Host, engine: Engine) -> Engine:
    """Returns it as it is afterwards. Raises NodeError if it does not serve again."""
    if engine.unit:
        host.run("systemctl", "restart", engine.unit, limit_s=RESTART_LIMIT_S)
    elif _program(engine.pid) == engine.program:  # else it has ended by itself
        os.kill(engine.pid, signal.SIGTERM)
        host.wait(lambda: _program(engine.pid) != engine.program, "containerd ends", RESTART_LIMIT_S)

    def serves() -> bool:
        try:
            _listener(host.path(engine.socket), engine.socket)
        except NodeError:
            return False
        return host.run(*engine.ctr, "version", check=False, limit_s=60).returncode == 0

    host.wait(serves, "containerd serves again", RESTART_LIMIT_S)
    return find_engine(host, engine.socket)


def _listener(path: Path, shown: str) -> int:
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(30)
        try:
            one.connect(str(path))
        except OSError as exc:
            hint = "only containerd is supported yet; does it run on this node?"
            raise NodeError(f"no containerd answers at {shown}: {exc.strerror or exc}; {hint}") from exc
        pid, _, _ = CREDENTIALS.unpack(one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    if pid == 0:
        raise NodeError("containerd's process is not seen: the job needs hostPID")
    return int(pid)


def _program(pid: int) -> str:
    """Empty for a process that has ended, reaped or not."""
    try:
        return os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
    except FileNotFoundError:
        return ""


def _option(words: list[str], *names: str) -> str:
    for index, word in enumerate(words):
        for name in names:
            if word == name and index + 1 < len(words):
                return words[index + 1]
            if word.startswith(f"{name}="):
                return word[len(name) + 1 :]
    return ""


def _unit(pid: int) -> str:
    """Source: cgroups(7), /proc/PID/cgroup: systemd's own hierarchy, or the only one."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        name = path.rpartition("/")[2]
        if controllers in ("", "name=systemd") and name.endswith(".service"):
            return name
    return ""
