"""A node of a cluster: containerd as a supervisor keeps it running, with directories of its own.

It has this machine's programs, and its own /run, /etc (an overlay), /opt, and the directories below /var that engines,
kubelets and Katapod write to, in mount and network namespaces of its own. At its end all of it goes.
While /run/refuse is there, the supervisor starts no containerd whose configuration has our handler.
"""

import contextlib
import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.kata import RUN_PREFIX, wait_for
from kit.oci_archive import PAUSE, image_archives
from kit.pod_network import open_netns, write_cni_config

__all__ = ["PAYLOAD", "ClusterNode", "cluster_node_running", "needs_payload"]

TOP = Path(__file__).resolve().parents[2]
IMAGES = "/var/cache/kata-containers"
PAYLOAD = TOP / "build/node-rootfs"
OWN = (
    "/opt",
    IMAGES,
    "/var/lib/katapod",
    "/var/lib/containerd",
    "/var/lib/kubelet",
    "/var/log/pods",
    "/var/log/containers",
)
WATCHED = ("/etc", "/opt", "/var/cache/kata-containers", "/var/lib/katapod", "/run/vc", "/run/katapod")
"""What an installation may write to."""

CONFIG = f"""version = 2
# an administrator's own file
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
disable_apparmor = true
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
"""
RUNC = """
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"""
HANDLER = RUNC + (TOP / "packaging/containerd/kata.toml").read_text().replace("version = 2\n", "")
"""Katapod of this work tree as the handler kata, as an administrator would set it up; with a first table of handlers
containerd no longer knows its default one by itself.
"""

INIT = """
set -e
mount --make-rshared / # as on a node with systemd
mkdir -p {data}/etc-upper {data}/etc-work
mount -t overlay -o lowerdir=/etc,upperdir={data}/etc-upper,workdir={data}/etc-work overlay /etc
for own in {own}; do
    mkdir -p "{data}$own"
    mount --bind "{data}$own" "$own"
done
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/lock /etc/containerd /etc/cni/net.d
cp {data}/config.toml /etc/containerd/config.toml
cp {data}/cni/* /etc/cni/net.d/
trap 'kill -9 $!; exit' TERM
while :; do
    if [ -e /run/refuse ] && grep -q katapod /etc/containerd/config.toml; then sleep 0.2; continue; fi
    containerd --config /etc/containerd/config.toml >> {data}/containerd.log 2>&1 &
    wait $! || true
    sleep 0.2
done
"""
START_LIMIT_S = 180.0
SHIM_FOLDER = Path(sys.executable).parent
_numbers = itertools.count(1)

needs_payload = pytest.mark.skipif(
    not (PAYLOAD / "usr/bin/kata-node").exists(), reason="no payload here: ROOTFS_ONLY=yes tools/build-node-image"
)


class ClusterNode:
    def __init__(self, netns: str, *, installed: bool = False) -> None:
        self.installed = installed
        self.own = [path for path in OWN if not (installed and path == IMAGES)]
        self.name = f"{RUN_PREFIX}n{next(_numbers)}"
        self.netns = netns
        self.data = Path("/var/lib") / self.name
        self._made = [path for path in self.own if not Path(path).exists()]
        self._init: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.data.mkdir(parents=True)
        for path in self.own:
            Path(path).mkdir(parents=True, exist_ok=True)
        (self.data / "config.toml").write_text(CONFIG + (HANDLER if self.installed else ""))
        write_cni_config(self.data / "cni", self.data / "leases")
        script = INIT.format(data=self.data, own=" ".join(self.own))
        command = ["nsenter", f"--net=/run/netns/{self.netns}", "unshare", "--mount", "--propagation", "private"]
        self._init = subprocess.Popen(
            [*command, "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=self._environment(),
        )
        wait_for(self.engine_serves, "the node's containerd serves", START_LIMIT_S, 0.2)
        for archive in image_archives():
            self.ok("ctr", "--namespace", "k8s.io", "images", "import", str(archive))

    def _environment(self) -> dict[str, str]:
        """Of its containerd. Where there is nothing of ours, the tests' settings for VMs are not there either."""
        if self.installed:
            return {**os.environ, "PATH": f"{SHIM_FOLDER}:{os.environ['PATH']}"}
        return {name: value for name, value in os.environ.items() if not name.startswith("KATAPOD_")}

    def command(self, *argv: str) -> list[str]:
        """`argv` on the node."""
        assert self._init is not None
        return [
            "nsenter",
            f"--mount=/proc/{self._init.pid}/ns/mnt",
            f"--net=/proc/{self._init.pid}/ns/net",
            "--",
            *argv,
        ]

    def run(self, *argv: str, limit_s: float = 120) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.command(*argv),
            cwd=TOP,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )

    def ok(self, *argv: str, limit_s: float = 120) -> str:
        done = self.run(*argv, limit_s=limit_s)
        assert done.returncode == 0, f"{argv}: {done.returncode}: {done.stderr[-3000:]}{done.stdout[-3000:]}"
        return done.stdout

    def kata_node(self, *args: str) -> "subprocess.CompletedProcess[str]":
        return self.run(sys.executable, "-m", "katapod.operator.node.main", *args, limit_s=1200)

    def engine_pid(self) -> int:
        """Of the containerd that runs now; 0 while there is none."""
        assert self._init is not None
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().split()
        names = {int(pid): Path(f"/proc/{pid}/comm").read_text().strip() for pid in children}
        return next((pid for pid, name in names.items() if name == "containerd"), 0)

    def path(self, path: str) -> Path:
        """A path of the node as it is seen from outside."""
        assert self._init is not None
        return Path(f"/proc/{self._init.pid}/root{path}")

    def engine_serves(self) -> bool:
        assert self._init is not None
        assert self._init.poll() is None, f"the node has ended: {self._init.returncode}"
        return self.run("ctr", "version").returncode == 0

    def files(self) -> dict[str, str]:
        """All that an installation may write to: path, and what is there."""
        root = str(self.path(""))
        found = {}
        for top in WATCHED:
            for folder, names, files in os.walk(root + top):
                for name in [*names, *files]:
                    path = f"{folder}/{name}"
                    found[path.removeprefix(root)] = _content(path)
        return found

    def stop(self) -> None:
        if self._init is not None:
            self._init.send_signal(signal.SIGTERM)
            self._init.wait(30)
            self._init = None
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self._processes(), f"the last processes of {self.name} end", 30)
        shutil.rmtree(self.data, ignore_errors=True)
        for path in reversed(self._made):
            with contextlib.suppress(OSError):
                os.rmdir(path)

    def _processes(self) -> list[int]:
        """Those that have the node's directories: its own, its shims', its sandboxes'."""
        mark = f"{self.data}/".encode()
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    if mark in Path(f"/proc/{entry}/mountinfo").read_bytes():
                        found.append(int(entry))
        return found


def _content(path: str) -> str:
    mode = f"{os.lstat(path).st_mode:o}"
    if os.path.islink(path):
        return f"{mode} {os.readlink(path)}"
    if os.path.isfile(path):
        return f"{mode} {hashlib.sha256(Path(path).read_bytes()).hexdigest()}"
    return mode


@contextlib.contextmanager
def cluster_node_running(netns: str | None = None, *, installed: bool = False) -> Iterator[ClusterNode]:
    """A node with test images, in the given network namespace, or in one of its own.

    `installed`: Katapod of this work tree is a handler of its containerd; else it has nothing of ours.
    """
    with contextlib.ExitStack() as stack:
        if netns is None:
            netns = f"{RUN_PREFIX}nn"
            stack.enter_context(open_netns(netns))
        found = ClusterNode(netns, installed=installed)
        stack.callback(found.stop)
        found.start()
        yield found
