"""What CRI-O does with a shim: the program's start, bundles, FIFOs, and its calls in its order.

No CRI-O is needed, and none is in Debian; the calls, their arguments and the specs are those that CRI-O 1.36 was seen
to make with its default configuration and seccomp profile. Values are the tests' own.
"""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from katapod.images.busybox import make_rootfs
from katapod.rpc.client import TtrpcClient
from katapod.shim.pb import task_pb2
from kit.kata import RUN_PREFIX
from kit.leaks import claim
from kit.seccomp import deny_by_default

__all__ = ["PAUSE", "Crio", "CrioContainer"]

SHIM = Path(sys.executable).parent / "containerd-shim-kata-v2"
SERVICE = "containerd.task.v2.Task"
BUSYBOX = Path("/bin/busybox")
PAUSE = ("sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 1000000 & wait $!; done")
CAPABILITIES = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SETGID"]
CAREFUL = ["nosuid", "noexec", "nodev"]
CALL_LIMIT_S = 240.0
_REQUESTS = {"Create": "CreateTask", "Exec": "ExecProcess", "Update": "UpdateTask"}


class Crio:
    """A node's CRI-O: where it keeps things, and the pod that it runs."""

    def __init__(self, folder: Path, netns: Path) -> None:
        self.folder, self.netns = folder, netns
        folder.mkdir()
        self.image = folder / "image"
        applets = subprocess.run([BUSYBOX, "--list-full"], check=True, capture_output=True, text=True).stdout.split()
        make_rootfs(self.image, BUSYBOX.read_bytes(), applets)
        (folder / "image-volumes").mkdir(mode=0o700)
        self.shared = folder / "pod"
        (self.shared / "shm").mkdir(parents=True)
        for name, text in (("resolv.conf", "search example\n"), ("hostname", "crio-pod\n"), (".containerenv", "")):
            (self.shared / name).write_text(text)
        self.sandbox_id = ""
        self._mounts: list[Path] = []

    def container(self, *command: str, sandbox: bool = False, mounts: Sequence[Mapping[str, Any]] = ()) -> Any:
        """A container whose root file system is mounted and whose bundle is written."""
        container_id = hashlib.sha256(f"{RUN_PREFIX}{len(self._mounts)}".encode()).hexdigest()
        claim(container_id)
        if sandbox:
            self.sandbox_id = container_id
        merged = self.folder / "overlay" / container_id / "merged"
        for name in ("upper", "work", "merged"):
            (merged.parent / name).mkdir(parents=True)
        options = f"lowerdir={self.image},upperdir={merged.parent / 'upper'},workdir={merged.parent / 'work'}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, merged], check=True)
        self._mounts.append(merged)
        bundle = self.folder / "overlay-containers" / container_id / "userdata"
        bundle.mkdir(parents=True, mode=0o700)
        spec = self._spec(container_id, command, merged, sandbox=sandbox, mounts=mounts)
        (bundle / "config.json").write_text(json.dumps(spec))
        return CrioContainer(container_id, bundle, self.folder / "fifo")

    def image_volume(self, destination: str) -> dict[str, Any]:
        """The image once more, read-only, as a volume: an overlay without an upper directory."""
        lower = f"lowerdir={self.image}:{self.folder / 'image-volumes'}"
        return {"destination": destination, "type": "overlay", "source": "overlay", "options": [lower]}

    def unmount(self) -> None:
        for point in self._mounts:
            subprocess.run(["umount", "--lazy", point], check=False)

    def _spec(
        self, container_id: str, command: Sequence[str], merged: Path, *, sandbox: bool, mounts: Sequence[Any]
    ) -> dict[str, Any]:
        kind = "sandbox" if sandbox else "container"
        resources: dict[str, Any] = {"devices": [{"allow": False, "access": "rwm"}], "cpu": {"shares": 2}}
        linux: dict[str, Any] = {
            "cgroupsPath": f"/{RUN_PREFIX}crio/crio-{container_id}",
            "namespaces": [
                {"type": "pid"},
                {"type": "network", "path": str(self.netns)},
                {"type": "ipc", "path": "/proc/self/ns/ipc"},
                {"type": "uts", "path": "/proc/self/ns/uts"},
                {"type": "mount"},
            ],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        }
        if not sandbox:
            memory = {"limit": 64 << 20, "swap": 64 << 20}
            cpu = {"shares": 512, "quota": 50000, "period": 100000}
            resources |= {"memory": memory, "cpu": cpu, "pids": {"limit": -1}}
            linux["seccomp"] = deny_by_default()
            del linux["seccomp"]["defaultErrno"]  # CRI-O leaves it out
        return {
            "ociVersion": "1.3.0",
            "process": {
                "user": {"uid": 0, "gid": 0, **({} if sandbox else {"additionalGids": [0]})},
                "args": list(command),
                "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
                "cwd": "/",
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
                "oomScoreAdj": -998 if sandbox else 900,
            },
            "root": {"path": str(merged), **({"readonly": True} if sandbox else {})},
            "hostname": "crio-pod",
            "mounts": [*_KERNEL_MOUNTS, *mounts, *self._shared_mounts(sandbox=sandbox)],
            "annotations": {
                "io.container.manager": "cri-o",
                "io.kubernetes.cri-o.ContainerType": kind,
                "io.kubernetes.cri-o.ContainerID": container_id,
                "io.kubernetes.cri-o.SandboxID": self.sandbox_id,
                "io.kubernetes.cri-o.KubeName": "crio-pod",
                "io.kubernetes.cri-o.Namespace": "tests",
                "io.kubernetes.cri-o.ImageName": "docker.io/katapod-tests/busybox:1",
                "io.kubernetes.cri-o.TTY": "false",
                "io.kubernetes.pod.uid": f"{RUN_PREFIX}uid",
            },
            "linux": {**linux, "resources": resources},
        }

    def _shared_mounts(self, *, sandbox: bool) -> list[dict[str, Any]]:
        careful = [*(["ro"] if sandbox else ["rw"]), "bind", *CAREFUL]
        places = [("resolv.conf", "/etc/resolv.conf", careful), ("shm", "/dev/shm", ["rw", "bind"])]
        places.append(("hostname", "/etc/hostname", careful))
        if not sandbox:
            cgroup = {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"}
            places.append((".containerenv", "/run/.containerenv", ["rw", "bind"]))
            return [{**cgroup, "options": [*CAREFUL, "relatime", "ro"]}, *map(self._bind, places)]
        return [*map(self._bind, places)]

    def _bind(self, place: tuple[str, str, list[str]]) -> dict[str, Any]:
        name, destination, options = place
        return {"destination": destination, "type": "bind", "source": str(self.shared / name), "options": options}


_KERNEL_MOUNTS: list[dict[str, Any]] = [
    {"destination": "/proc", "type": "proc", "source": "proc", "options": CAREFUL},
    {
        "destination": "/dev",
        "type": "tmpfs",
        "source": "tmpfs",
        "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
    },
    {
        "destination": "/dev/pts",
        "type": "devpts",
        "source": "devpts",
        "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
    },
    {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": CAREFUL},
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*CAREFUL, "ro"]},
]


class CrioContainer:
    """A container and CRI-O's connection to its shim. Its output is read all the time."""

    def __init__(self, container_id: str, bundle: Path, fifos: Path) -> None:
        self.id, self.bundle = container_id, bundle
        self.output = b""
        self.address = ""
        self._fifos = fifos
        self._client: TtrpcClient | None = None
        self._log = -1
        self._readers: list[int] = []

    async def start_shim(self) -> str:
        """Run `start`, for each container of a pod, and connect. Returns the address."""
        os.mkfifo(self.bundle / "log", 0o600)
        self._log = os.open(self.bundle / "log", os.O_RDONLY | os.O_NONBLOCK)
        words = [str(SHIM), "-namespace", "default", "-address", "", "-publish-binary", "/usr/bin/crio", "-id", self.id]
        settings = {"GOMAXPROCS": "2", "MAX_SHIM_VERSION": "2", "TTRPC_ADDRESS": "", "GRPC_ADDRESS": ""}
        process = await asyncio.create_subprocess_exec(
            *words,
            "start",
            cwd=self.bundle,
            env={**os.environ, **settings, "NAMESPACE": "default"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        self.address = out.decode().strip()
        await self.reconnect()
        return self.address

    async def reconnect(self) -> None:
        """As a CRI-O that has started again: by the file `address` of each container's bundle."""
        self.close_connection()
        path = (self.bundle / "address").read_text().removeprefix("unix://")
        self._client = await TtrpcClient.on_unix_path(path, "the shim")

    def close_connection(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    async def call(self, method: str, **fields: Any) -> Any:
        """Task.`method` about this container; returns the answer. Raises RpcError."""
        assert self._client is not None
        name = _REQUESTS.get(method, method)
        request = getattr(task_pb2, f"{name}Request")(id=self.id, **fields)
        data = await self._client.call_raw(SERVICE, method, request.SerializeToString(), CALL_LIMIT_S)
        answer = getattr(task_pb2, f"{name}Response", None)
        return answer.FromString(data) if answer is not None else data

    def streams(self, name: str = "") -> dict[str, str]:
        """FIFOs for both outputs, which this reads."""
        folder = self._fifos / f"{self.id}{name}"
        folder.mkdir(parents=True)
        paths = {stream: str(folder / f"{self.id}-{stream}") for stream in ("stdout", "stderr")}
        for path in paths.values():
            os.mkfifo(path, 0o600)
            reader = os.open(path, os.O_RDWR | os.O_NONBLOCK)
            self._readers.append(reader)
            asyncio.get_running_loop().add_reader(reader, self._take, reader)
        return paths

    def _take(self, reader: int) -> None:
        self.output += os.read(reader, 65536)

    async def exec(self, exec_id: str, *command: str) -> int:
        """Run a command in it, as ExecSync does; its output joins the container's."""
        environment = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
        process = {"args": list(command), "cwd": "/", "env": environment, "user": {"uid": 0, "gid": 0}}
        kind = "types.containerd.io/opencontainers/runtime-spec/1/Process"
        spec = {"type_url": kind, "value": json.dumps(process).encode()}
        await self.call("Exec", exec_id=exec_id, spec=spec, **self.streams(f"-{exec_id}"))
        await self.call("Start", exec_id=exec_id)
        status = (await self.call("Wait", exec_id=exec_id)).exit_status
        await self.call("Delete", exec_id=exec_id)
        return int(status)

    async def says(self, text: bytes, limit_s: float = 180.0) -> None:
        async with asyncio.timeout(limit_s):
            while text not in self.output:  # noqa: ASYNC110 - it comes from a FIFO
                await asyncio.sleep(0.02)

    def close(self) -> None:
        self.close_connection()
        for reader in self._readers:
            asyncio.get_running_loop().remove_reader(reader)
            os.close(reader)
        self._readers.clear()
        if self._log >= 0:
            os.close(self._log)
            self._log = -1
