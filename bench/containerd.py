"""A containerd of the benchmark's own, and `ctr run` as a way to start a container: with runc and with Katapod."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.contestants import Contestant
from bench.measure import BenchError, Outcome, execute

__all__ = ["CTR_EMULATED", "CTR_KATAPOD", "CTR_RUNC", "Ctr", "running_containerd", "shim_resident_mib", "start_of_shim"]

CTR_RUNC, CTR_KATAPOD, CTR_EMULATED = "ctr, runc", "ctr, Katapod", "ctr, Katapod by emulation"
SHIM = Path(sys.executable).with_name("containerd-shim-kata-v2")
START_LIMIT_S = 30.0
IMAGE = "localhost/bench/busybox"
CONFIG = """
version = 2
root = "{disk}/root"
state = "{run}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{run}/sock"
[ttrpc]
address = "{run}/sock.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
path = "{disk}/opt"
"""


@dataclass(frozen=True)
class Ctr(Contestant):
    """`ctr run`. `config`: for Katapod's shim; empty for another runtime."""

    name: str
    runtime: str
    socket: Path
    image: str
    config: str = ""
    volumes: tuple[str, ...] = ()  # SRC:DST

    def missing(self) -> str:
        if not shutil.which("containerd"):
            return "containerd is not installed"
        return "" if self.socket.exists() else "containerd does not run"

    def call(self, *arguments: str) -> list[str]:
        return ["ctr", "--address", str(self.socket), "--namespace", "bench", *arguments]

    def _what(self) -> list[str]:
        config = ["--runtime-config-path", self.config] if self.config else []
        mounts = []
        for volume in self.volumes:
            source, _, target = volume.partition(":")
            mounts += ["--mount", f"type=bind,src={source},dst={target},options=rbind:rw"]
        return ["--runtime", self.runtime, *config, *mounts, self.image]

    def run(self, name: str, command: Sequence[str]) -> list[str]:
        return self.call("run", "--rm", *self._what(), name, *command)

    def run_detached(self, name: str, command: Sequence[str]) -> list[str]:
        return self.call("run", "--detach", *self._what(), name, *command)

    def run_in_netns(self, name: str, netns: str, command: Sequence[str]) -> list[str]:
        """As a pod: in a network namespace that is there already."""
        return self.call("run", "--detach", "--with-ns", f"network:{netns}", *self._what(), name, *command)

    def exec(self, name: str, command: Sequence[str]) -> list[str]:
        return self.call("tasks", "exec", "--exec-id", self.new_id(), name, *command)

    def delete(self, name: str) -> list[str]:
        ctr = " ".join(self.call())
        return ["sh", "-c", f"{ctr} tasks delete --force {name}; {ctr} containers delete {name}"]


@contextlib.contextmanager
def running_containerd(disk: Path, run: Path, archive: Path) -> Iterator[tuple[Path, str]]:
    """Serve while the block runs; yields the socket and the name of the image of `archive`. Raises BenchError."""
    for folder in (disk, run):
        folder.mkdir(parents=True, exist_ok=True)
    config, socket = run / "config.toml", run / "sock"
    config.write_text(CONFIG.format(disk=disk, run=run))
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((disk / "log").open("wb"))
        try:
            daemon = subprocess.Popen(
                ["containerd", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": f"{SHIM.parent}:{os.environ['PATH']}"},
                start_new_session=True,
            )
        except OSError as exc:
            raise BenchError(f"cannot start containerd: {exc.strerror}") from exc
        stack.callback(daemon.wait)
        stack.callback(daemon.terminate)
        ctr = ["ctr", "--address", str(socket), "--namespace", "bench"]
        deadline = time.monotonic() + START_LIMIT_S
        while subprocess.run([*ctr, "version"], capture_output=True, check=False).returncode != 0:
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"containerd does not serve; its log is {disk / 'log'}")
            time.sleep(0.05)
        named = archive.with_suffix(".oci.tar")  # Docker's archives need not have names
        execute(["skopeo", "copy", "--quiet", f"docker-archive:{archive}", f"oci-archive:{named}:latest"])
        execute([*ctr, "images", "import", "--base-name", IMAGE, str(named)])
        yield socket, f"{IMAGE}:latest"


def shim_resident_mib(name: str) -> float:
    """Resident memory of the shim of this container. Raises BenchError."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            if (
                b"start" in words
                and name.encode() in words
                and any(word.endswith(SHIM.name.encode()) for word in words)
            ):
                status = Path(f"/proc/{entry}/status").read_text()
                line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
                return int(line.split()[1]) / 1024
    raise BenchError(f"there is no shim of {name}")


def start_of_shim(folder: Path) -> Outcome:
    """`containerd-shim-kata-v2 start` in a bundle of its own; the server that it leaves is ended. Raises BenchError."""
    bundle = folder / "shim-bundle"
    bundle.mkdir(exist_ok=True)
    (bundle / "config.json").write_text(json.dumps({"ociVersion": "1.0.2", "annotations": {}}))
    arguments = [str(SHIM), "-namespace", "bench", "-id", f"bench-{os.getpid()}", "-address", "", "start"]
    outcome = execute(["sh", "-c", 'cd "$0" && exec "$@"', str(bundle), *arguments])
    with contextlib.suppress(OSError, ValueError):
        os.kill(int((bundle / "shim.pid").read_text()), 15)
    return outcome
