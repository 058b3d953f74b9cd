"""A pool's server for a test: `kata-runtime factory init` with vm_cache_number, on a socket of its own."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from katapod.supervisor import pool_wire as wire
from katapod.supervisor.pool_client import exchange
from kit.kata import Kata, Result, wait_for
from kit.templates import kata_command, templates_are_on

__all__ = [
    "KILLED",
    "PHASES",
    "STATE",
    "Pool",
    "attached",
    "check_killed",
    "left_of",
    "machine_of",
    "machines_of",
    "running_pool",
    "supervisor_of",
]

READY_LIMIT_S = 600.0  # machines of a pool leave the CPU to others, a tenth at worst
ANSWER_LIMIT_S = 180.0
STATE = Path("/run/vc/sbs")
ROOTS = (
    STATE,
    Path("/run/vc/vm"),
    Path("/run/kata-containers/shared/sandboxes"),
    Path("/var/lib/katapod/sandboxes"),
    Path("/var/lib/katapod/images/refs"),
)


class Pool:
    """The server's process, and `kata-runtime` with its configuration."""

    def __init__(self, kata: Kata, folder: Path, number: int, extra: str = "") -> None:
        self.kata = kata
        self.number = number
        self.config = folder / "pool.toml"
        self.endpoint = folder / "cache.sock"
        self.machines: set[str] = set()  # ids of all that have been seen
        templates = str(templates_are_on()).lower()
        self.config.write_text(
            f'[factory]\nvm_cache_number = {number}\nvm_cache_endpoint = "{self.endpoint}"\n'
            f"enable_template = {templates}\n{extra}"
            "[agent.kata]\ndial_timeout = 120\n"  # a boot at low priority beside two busy workers
        )

    def command(self, *args: str) -> list[str]:
        return kata_command("--config", str(self.config), *args)

    def __call__(self, *args: str, input: str | bytes | None = None) -> Result:
        return self.kata("--config", str(self.config), *args, input=input)

    def vms(self) -> set[int]:
        """QEMU's process id of each machine that is ready; none where no server is."""
        status = self.status()
        return {vm["pid"] for vm in status["vms"]} if status else set()

    def status(self) -> dict[str, Any] | None:
        """As `factory status --json` has it; None where no server is. Asked for so often that a process for each would
        take a good part of a CPU from the machines that are waited for."""
        answer = exchange(str(self.endpoint), wire.STATUS, ANSWER_LIMIT_S)
        if answer is None:
            return None
        found: dict[str, Any] = json.loads(answer)
        self.machines |= machines_of(found["pid"])
        return found

    def alive(self) -> set[str]:
        """Ids of the machines that the server's children have or start; they count as seen from now on."""
        status = self.status()
        found = machines_of(status["pid"]) if status else set()
        self.machines |= found
        return found

    def wait_full(self) -> set[int]:
        """Wait until all machines are ready; returns their QEMUs."""
        found: set[int] = wait_for(
            lambda: vms if len(vms := self.vms()) == self.number else None, "a full pool", READY_LIMIT_S
        )
        return found

    def taking(self, *args: str, input: str | bytes | None = None) -> Result:
        """As a call, and see to it that a machine of the pool was taken for it."""
        before = self.wait_full()
        result = self(*args, input=input)
        assert before - self.vms(), f"no machine was taken: {result}"
        return result


@contextlib.contextmanager
def running_pool(pool: Pool) -> Iterator[subprocess.Popen[str]]:
    """Run its server while the block runs; what nobody has taken is gone at the end."""
    server = subprocess.Popen(
        pool.command("factory", "init"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    try:
        yield server
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
        try:
            out, err = server.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            server.kill()
            out, err = server.communicate()
            raise AssertionError(f"the server does not end: {out} {err}") from None
        print(f"the server said: {out!r} {err!r}")


def machines_of(server: int) -> set[str]:
    """Ids of the machines that the server's children have or start."""
    found = set()
    for folder in STATE.glob("pool-*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            supervisor = json.loads((folder / "persist.json").read_text())["supervisor_pid"]
            if Path(f"/proc/{supervisor}/stat").read_text().rpartition(")")[2].split()[1] == str(server):
                found.add(folder.name)
    return found


def left_of(machine_id: str) -> list[str]:
    """What is there of a machine: directories, mounts, processes."""
    found = [str(root / machine_id) for root in ROOTS if (root / machine_id).exists()]
    found += [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if machine_id in line]
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and machine_id in Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace"):
                found.append(f"process {entry}")
    return found


def machine_of(name: str) -> str:
    found: str = json.loads((STATE / name / "persist.json").read_text())["machine_id"]
    return found


def supervisor_of(name: str) -> int:
    found: int = json.loads((STATE / name / "persist.json").read_text())["supervisor_pid"]
    return found


def is_running(name: str) -> bool:
    containers = json.loads((STATE / name / "persist.json").read_text())["containers"]
    return bool(containers) and containers[0]["state"] == "running"


@contextlib.contextmanager
def attached(pool: Pool, name: str) -> Iterator["subprocess.Popen[str]"]:
    """A container that waits, in a machine of the pool."""
    command = pool.command("run", "--rm", "--name", name, "busybox", "sleep", "1000")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        try:
            wait_for(lambda: is_running(name), "the container runs")
            yield client
        finally:
            if client.poll() is None:
                client.kill()


KILLED = "kata-runtime: the process of the pool that ran the container was killed\n"


def container_state(record: dict[str, Any]) -> str:
    return str(record["containers"][0]["state"]) if record["containers"] else ""


PHASES: dict[str, Callable[[dict[str, Any]], object]] = {
    "claimed": lambda record: True,
    "taken": lambda record: record["machine_id"],
    "opened": lambda record: record["state"] == "running",
    "created": lambda record: container_state(record) in ("created", "running"),
    "running": lambda record: container_state(record) == "running",
}


def check_killed(pool: Pool, victim: str, phase: str) -> None:
    pool.wait_full()
    name = pool.kata.name()

    def reached() -> dict[str, Any] | None:
        record: dict[str, Any] = json.loads((STATE / name / "persist.json").read_text())
        return record if PHASES[phase](record) else None

    command = pool.command("run", "--rm", "--name", name, "busybox", "sleep", "1000")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        record = wait_for(reached, phase, 180, 0.001)
        os.kill(client.pid if victim == "client" else record["supervisor_pid"], signal.SIGKILL)
        _, err = client.communicate(timeout=180)
    assert (client.returncode, err) == ((-signal.SIGKILL, "") if victim == "client" else (125, KILLED)), phase
    wait_for(lambda: left_of(name) == [], f"nothing is left, killed when {phase}")
    wait_for(lambda: all(left_of(other) == [] for other in pool.machines - pool.alive()), "nor of its machine")
