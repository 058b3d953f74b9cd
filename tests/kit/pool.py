"""A pool's server for a test: `kata-runtime factory init` with vm_cache_number, on a socket of its own."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kit.kata import Kata, Result, wait_for
from kit.templates import kata_command, templates_are_on

__all__ = ["Pool", "left_of", "machines_of", "running_pool"]

READY_LIMIT_S = 120.0
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
        done = subprocess.run(self.command("factory", "status", "--json"), capture_output=True, text=True, check=True)
        found: dict[str, Any] | None = json.loads(done.stdout)["cache"]
        if found:
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
            out, err = server.communicate(timeout=60)
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
            owner = json.loads((folder / "persist.json").read_text())["owner_pid"]
            if Path(f"/proc/{owner}/stat").read_text().rpartition(")")[2].split()[1] == str(server):
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
