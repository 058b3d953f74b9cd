"""A dockerd with `kata-runtime`, or runc, for its runtime: storage, state, socket and network of the tests' own."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kit.containerd import CGROUPS
from kit.kata import KATA, RUN_PREFIX, wait_for
from kit.leaks import claim
from kit.oci import make_rootfs
from kit.pod_network import in_netns, open_netns

__all__ = ["BRIDGE_ADDRESS", "Docker", "docker_here"]

LIMIT_S = 240.0  # only against hanging
IMAGE = "tools:1"
BRIDGE_ADDRESS = "10.88.8.1"
CLIENT = "/usr/bin/docker"  # the distribution's, as dockerd is
_numbers = itertools.count(1)


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Docker:
    """IMAGE is there. `runtime`: kata, or runc as the reference."""

    def __init__(self, runtime: str = "kata") -> None:
        self.runtime = runtime
        self.name = f"{RUN_PREFIX}d{next(_numbers)}"
        self.run_dir = Path("/run") / self.name  # short: it has sockets
        self.data_dir = Path("/var/lib") / self.name
        self.image = IMAGE
        self._daemon: subprocess.Popen[bytes] | None = None

    @property
    def states(self) -> Path:
        """The --root that it gives its runtime."""
        return self.run_dir / "exec/runtime-runc/moby"

    def command(self, *words: str, buildkit: bool = False) -> list[str]:
        settings = (f"DOCKER_BUILDKIT={int(buildkit)}", f"DOCKER_CONFIG={self.data_dir}/client")
        return ["env", *settings, CLIENT, "--host", f"unix://{self.run_dir}/s", *words]

    def __call__(self, *words: str, input: str = "", buildkit: bool = False) -> Done:
        command = self.command(*words, buildkit=buildkit)
        done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    def ok(self, *words: str, input: str = "") -> str:
        done = self(*words, input=input)
        assert done.code == 0, f"docker {' '.join(words)}: {done}; the daemon said {self.log_tail()}"
        return done.out

    def start(self, *words: str) -> str:
        """`run -d WORDS`; returns the id, which is the test's from now on."""
        found = self.ok("run", "-d", *words).strip()
        claim(found)
        return found

    def on_the_host(self, *words: str) -> Done:
        """Run a command where the bridge is."""
        done = subprocess.run(in_netns(self.name, words), capture_output=True, text=True, timeout=LIMIT_S, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    def sandbox(self, container: str) -> str:
        """The name of the VM that it is in."""
        return str(json.loads((self.states / container / "state.json").read_text())["sandbox"])

    def remove_containers(self) -> None:
        """With their network namespaces, which the daemon would keep for another minute."""
        if left := self.ok("ps", "-a", "-q").split():
            self.ok("rm", "-f", *left)
        for entry in (self.run_dir / "exec/netns").iterdir():
            if entry.name != "default":
                subprocess.run(
                    ["umount", "--lazy", entry], capture_output=True, check=False
                )  # or it has gone meanwhile

    # the daemon

    def open(self) -> None:
        """Start it, also again after `kill`; returns when it serves."""
        config = {
            "data-root": str(self.data_dir / "root"),
            "exec-root": str(self.run_dir / "exec"),
            "pidfile": str(self.run_dir / "pid"),
            "deprecated-key-path": str(self.data_dir / "key.json"),
            "hosts": [f"unix://{self.run_dir}/s"],
            "bip": f"{BRIDGE_ADDRESS}/24",
            "storage-driver": "overlay2",
            "cgroup-parent": f"/{self.name}",
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "oom-score-adjust": 0,  # without CAP_SYS_RESOURCE nobody may lower a score
            "live-restore": True,
            "runtimes": {"kata": {"path": KATA}},
            "default-runtime": self.runtime,
        }
        for directory in (self.run_dir, self.data_dir, *self._cgroups()):
            directory.mkdir(exist_ok=True)
        (self.run_dir / "daemon.json").write_text(json.dumps(config))
        programs = self.data_dir / "bin"  # BuildKit takes what is `runc` to dockerd, whatever the default runtime is
        programs.mkdir(exist_ok=True)
        if self.runtime == "kata" and not (programs / "runc").is_symlink():
            (programs / "runc").symlink_to(KATA)
        with (self.data_dir / "log").open("ab") as log:
            self._daemon = subprocess.Popen(
                in_netns(self.name, ["dockerd", "--config-file", str(self.run_dir / "daemon.json")]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
            )
        wait_for(lambda: self("version").code == 0, "dockerd serves")

    def kill(self) -> None:
        """Containers go on without it. Its containerd dies with it, and has to be gone: the next dockerd would take one
        that still dies for one that serves."""
        assert self._daemon is not None
        containerd = Path("/proc") / (self.run_dir / "exec/containerd/containerd.pid").read_text()
        self._daemon.kill()
        self._daemon.wait(LIMIT_S)
        self._daemon = None
        wait_for(lambda: not containerd.exists(), "the end of dockerd's containerd")

    def close(self) -> None:
        """End it, and take away all that it made."""
        if self._daemon is not None:
            self._daemon.terminate()
            self._daemon.wait(LIMIT_S)
        with contextlib.suppress(OSError, ValueError):  # that of a dockerd that was killed and did not come back
            os.kill(int((self.run_dir / "exec/containerd/containerd.pid").read_text()), signal.SIGKILL)
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for point in reversed(points):
            if point.startswith((f"{self.run_dir}/", f"{self.data_dir}/")):
                subprocess.run(["umount", "--lazy", point], check=True)
        for directory in (self.run_dir, self.data_dir):
            shutil.rmtree(directory)
        for directory in self._cgroups():
            _remove_cgroup(directory)

    def _cgroups(self) -> list[Path]:
        """The parent of its containers' cgroups, which it does not take away."""
        groups = (entry for entry in sorted(CGROUPS.iterdir()) if entry.is_dir() and not entry.is_symlink())
        return [group / self.name for group in groups]

    def log_tail(self) -> str:
        return (self.data_dir / "log").read_text(errors="replace")[-3000:]


def _remove_cgroup(directory: Path) -> None:
    """A process that has just been killed may still be counted."""
    deadline = time.monotonic() + 30
    while directory.exists():
        try:
            directory.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def docker_here(runtime: str = "kata") -> Iterator[Docker]:
    """All that it has goes with the block."""
    docker = Docker(runtime)
    with open_netns(docker.name):
        try:
            docker.open()
            make_rootfs(docker.data_dir / "rootfs")
            archive = docker.data_dir / "image.tar"
            subprocess.run(["tar", "-C", docker.data_dir / "rootfs", "-cf", archive, "."], check=True)
            docker.ok("import", str(archive), IMAGE)
            # refused, but the daemon has a mount for this network from its first container on, and keeps it
            docker("run", "--rm", "--network", "host", IMAGE, "true")
            yield docker
            docker.remove_containers()
        finally:
            docker.close()
