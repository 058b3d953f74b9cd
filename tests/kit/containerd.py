"""Debian's containerd, started by the tests with everything of its own, and `ctr`, its users' tool.

The instance lives below /run/TNNN-cN (state, sockets: paths must be short, since they become socket addresses) and
/var/lib/TNNN-cN (images, snapshots), in a network namespace of its own, and takes all of it away at its end.
"""

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kit.events import Events, listening
from kit.kata import KATA, RUN_PREFIX, STREAM_SHOWN, Result, wait_for
from kit.oci_archive import PAUSE, image_archives
from kit.pod_network import in_netns, open_netns, write_cni_config

__all__ = [
    "CGROUPS",
    "CGROUP_PARENT",
    "CONSOLE_CONFIG",
    "DEBIAN_CONFIG",
    "HANDLERS",
    "K8S",
    "Containerd",
    "containerd_running",
]

DEBIAN_CONFIG = """version = 2

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/lib/cni"
      conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.internal.v1.opt"]
    path = "/var/lib/containerd"
"""
"""/etc/containerd/config.toml of Debian 12, which names no handler."""

HANDLERS = {"runc": "io.containerd.runc.v2", "kata": "io.containerd.kata.v2"}
"""Runtime handler of a pod: runtime type, which is also what `ctr run --runtime` takes."""

K8S = "k8s.io"
CGROUP_PARENT = f"/{RUN_PREFIX}pods"
"""Pods of CRI go below this cgroup."""

SHIM_FOLDER = Path(sys.executable).parent
CGROUPS = Path("/sys/fs/cgroup")
RUNC_ROOT = Path("/run/containerd/runc")
START_LIMIT_S = 180.0
_numbers = itertools.count(1)

CONFIG = """
version = 2
root = "{data}/root"
state = "{run}/state"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
address = "{run}/sock"
[ttrpc]
address = "{run}/sock.ttrpc"
[timeouts]  # beside builds on two cores; after its five seconds a shim's delete is killed
"io.containerd.timeout.shim.cleanup" = "60s"
"io.containerd.timeout.shim.load" = "60s"
[plugins."io.containerd.internal.v1.opt"]
path = "{data}/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
disable_apparmor = true
enable_selinux = false
# without CAP_SYS_RESOURCE nobody may lower a score
restrict_oom_score_adj = true
stream_server_address = "127.0.0.1"
stream_server_port = "0"
stats_collect_period = 1
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{run}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata]
runtime_type = "io.containerd.kata.v2"
privileged_without_host_devices = true
pod_annotations = ["io.katacontainers.*"]
container_annotations = ["io.katacontainers.*"]
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata-runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata-runc.options]
BinaryName = "{runtime}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata-console]
runtime_type = "io.containerd.kata.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata-console.options]
ConfigPath = "{run}/console.toml"
"""

CONSOLE_CONFIG = "[agent.kata]\ndebug_console_enabled = true\n"
"""configuration.toml of the runtime handler kata-console."""

KATA_OPTIONS = """
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{handler}.options]
ConfigPath = "{config}"
"""
MORE_HANDLER = """
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{handler}]
runtime_type = "io.containerd.kata.v2"
"""


class Containerd:
    """One containerd and its `ctr`. Remembers what was run, for the evidence of a failed test."""

    def __init__(self, kata_config: Path | None = None, more_handlers: Mapping[str, Path] | None = None) -> None:
        self._kata_config = kata_config  # None: where Katapod looks by itself
        self._more_handlers = dict(more_handlers or {})  # each with a configuration file of its own
        self.name = f"{RUN_PREFIX}c{next(_numbers)}"
        self.run_dir = Path("/run") / self.name
        self.data_dir = Path("/var/lib") / self.name
        self.socket = self.run_dir / "sock"
        self.netns = self.name
        self.namespace = f"{self.name}-ns"  # of containerd, for what ctr runs; it names the cgroup as well
        self.log = self.data_dir / "containerd.log"
        # of another process with our number, killed: in a PID namespace numbers come again soon
        shutil.rmtree(self.data_dir, ignore_errors=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._transcript: list[str] = []
        self._ids = itertools.count(1)

    # Its life

    def start(self) -> None:
        """Start the daemon, also again after `stop` on the same state; returns when it serves."""
        assert self._process is None, "containerd runs already"
        for folder in (self.run_dir, self.data_dir):
            folder.mkdir(parents=True, exist_ok=True)
        for parent in self._parents():  # as kubelet and systemd do; they outlive each test that uses this instance
            parent.mkdir(parents=True, exist_ok=True)
        config = CONFIG.format(run=self.run_dir, data=self.data_dir, pause=PAUSE, runtime=KATA)
        if self._kata_config is not None:
            config += KATA_OPTIONS.format(handler="kata", config=self._kata_config)
        for handler, file in self._more_handlers.items():
            config += MORE_HANDLER.format(handler=handler) + KATA_OPTIONS.format(handler=handler, config=file)
        (self.run_dir / "config.toml").write_text(config)
        (self.run_dir / "console.toml").write_text(CONSOLE_CONFIG)
        write_cni_config(self.run_dir / "cni", self.data_dir / "leases")
        path = f"{SHIM_FOLDER}:{os.environ['PATH']}"  # where the shims are looked for
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                in_netns(self.netns, ["containerd", "--config", str(self.run_dir / "config.toml")]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": path},
                start_new_session=True,
            )
        wait_for(self._serves, f"containerd serves; its log ends: {self.log_tail()}", START_LIMIT_S, 0.1)

    def stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        """End the daemon; containers go on without it."""
        if self._process is None:
            return
        self._process.send_signal(by)
        try:
            self._process.wait(180)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(180)
            raise AssertionError(f"containerd did not end within 30 s of {by.name}: {self.log_tail()}") from None
        finally:
            self._process = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _parents(self) -> Iterator[Path]:
        """Folders that a first container brings about and no last one takes away: cgroups, runc's own."""
        for hierarchy in sorted(CGROUPS.iterdir()):
            if hierarchy.is_dir() and not hierarchy.is_symlink():
                yield hierarchy / self.namespace
                yield hierarchy / CGROUP_PARENT.strip("/")
        yield RUNC_ROOT / self.namespace
        yield RUNC_ROOT / K8S

    def remove_files(self) -> None:
        """Folders, mounts and cgroup parents. What is still in use stays, for the leak probe to find."""
        for point in reversed(self._mounts()):
            subprocess.run(["umount", "--lazy", point], capture_output=True, check=False)
        for folder in (self.run_dir, self.data_dir):
            shutil.rmtree(folder, ignore_errors=True)
        for parent in self._parents():
            with contextlib.suppress(OSError):
                parent.rmdir()

    def _mounts(self) -> list[str]:
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        return [point for point in points if point.startswith((f"{self.run_dir}/", f"{self.data_dir}/"))]

    def _serves(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"containerd ended with {self._process.returncode}: {self.log_tail()}"
        done = subprocess.run([*self._ctr, "version"], capture_output=True, timeout=180, check=False)
        return done.returncode == 0

    def import_images(self) -> None:
        """Bring the test images in: for CRI and for ctr."""
        for archive in image_archives():
            for namespace in (self.namespace, K8S):
                self.ok("images", "import", str(archive), namespace=namespace, timeout=180)

    # ctr

    @property
    def _ctr(self) -> list[str]:
        return ["ctr", "--address", str(self.socket)]

    def command(self, *args: str, namespace: str | None = None) -> list[str]:
        """`ctr ARGS` as a list."""
        return [*self._ctr, "--namespace", namespace or self.namespace, *args]

    def new_id(self) -> str:
        """An id for a container that nothing else has."""
        return f"{self.name}-{next(self._ids)}"

    def __call__(
        self, *args: str, input: str | bytes | None = None, timeout: float = 240, namespace: str | None = None
    ) -> Result:
        """Run `ctr ARGS` to its end. Raises TimeoutExpired; then it has been killed."""
        started = time.monotonic()
        data = input.encode() if isinstance(input, str) else input
        try:
            done = subprocess.run(
                self.command(*args, namespace=namespace),
                input=data,
                stdin=subprocess.DEVNULL if data is None else None,
                capture_output=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            self._note(args, "no end", time.monotonic() - started, exc.stdout or b"", exc.stderr or b"")
            raise
        self._note(args, str(done.returncode), time.monotonic() - started, done.stdout, done.stderr)
        return Result(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))

    def ok(
        self, *args: str, input: str | bytes | None = None, timeout: float = 240, namespace: str | None = None
    ) -> str:
        """Run `ctr ARGS`, which has to succeed; return its stdout."""
        result = self(*args, input=input, timeout=timeout, namespace=namespace)
        assert result.code == 0, f"ctr {shlex.join(args)}: {result}"
        return result.stdout

    @contextlib.contextmanager
    def spawn(self, *args: str, **kwargs: Any) -> Iterator[subprocess.Popen[bytes]]:
        """`ctr ARGS` while the block runs; what still runs at its end is killed."""
        self.note(f"$ ctr {shlex.join(args)} &")
        with subprocess.Popen(self.command(*args), **kwargs) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()

    def events(self) -> contextlib.AbstractContextManager[Events]:
        """`ctr events` while the block runs."""

        def stir(number: int) -> None:
            self.ok("namespaces", "label", self.namespace, f"stir=stir-{number}")

        return listening(self.command("events"), stir)

    def tasks(self, namespace: str | None = None) -> dict[str, str]:
        """Status by id, as `ctr tasks list` has it: RUNNING, STOPPED, PAUSED, CREATED."""
        rows = self.ok("tasks", "list", namespace=namespace).splitlines()[1:]
        return {words[0]: words[-1] for words in (row.split() for row in rows)}

    def delete(self, container: str) -> int:
        """Delete a task that has stopped; returns the exit status that containerd kept of it."""
        result = self("tasks", "delete", container)
        assert result.code == 0, result
        told = re.search(r"exit with non-zero exit code (\d+)", result.stderr)
        return int(told[1]) if told else 0

    def info(self, container: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ok("containers", "info", container))
        return found

    def remove_all(self) -> None:
        """Kill and remove every task and container of `ctr`; for the end of a test."""
        for task in self.tasks():
            self("tasks", "delete", "--force", task)
        listed = self.ok("containers", "list", "--quiet").split()
        if listed:
            self.ok("containers", "delete", *listed)

    # Evidence

    @property
    def transcript(self) -> str:
        """All that was run and said, for a failed test."""
        return "\n".join(self._transcript)

    def note(self, line: str) -> None:
        self._transcript.append(f"{line}\n")

    def forget(self) -> None:
        """Begin a new transcript: for each test that uses a shared containerd."""
        self._transcript.clear()

    def log_tail(self, characters: int = 3000) -> str:
        return self.log.read_text(errors="replace")[-characters:] if self.log.exists() else "(none)"

    def _note(self, args: Sequence[str], status: str, seconds: float, out: bytes, err: bytes) -> None:
        lines = [f"$ ctr {shlex.join(args)}\nstatus {status} after {seconds:.2f} s"]
        for stream, data in (("stdout", out), ("stderr", err)):
            if data:
                lines.append(f"{stream}, {len(data)} bytes:\n{data[-STREAM_SHOWN:].decode(errors='replace')}")
        self.note("\n".join(lines))


@contextlib.contextmanager
def containerd_running(
    kata_config: Path | None = None, more_handlers: Mapping[str, Path] | None = None
) -> Iterator[Containerd]:
    """A containerd with the test images, which takes away all that it made. Its pods have to be removed before."""
    found = Containerd(kata_config, more_handlers)
    with open_netns(found.netns):
        try:
            found.start()
            found.import_images()
            yield found
            found.remove_all()
        finally:
            found.stop()
            _end_processes(found)
            found.remove_files()


def _end_processes(one: Containerd) -> None:
    """End what a failed test left: shims and whatever else has this instance's paths in its command line."""
    for pid in _processes_of(one):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not _processes_of(one), f"the last processes of {one.name} end")


def _processes_of(one: Containerd) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{entry}/cmdline").read_bytes()
                if re.search(rb"/(run|var/lib)/%b[/\0]" % re.escape(one.name.encode()), words):
                    found.append(int(entry))
    return found
