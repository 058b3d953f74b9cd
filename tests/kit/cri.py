"""A client of the CRI as the kubelet is one: pods and containers by containerd's gRPC socket.

The messages are compiled from cri.proto when this module is first used. They are made from and read as plain fields:
`cri("ExecSync", container_id=ID, cmd=["true"]).exit_code`.
"""

import functools
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc

from kit.containerd import CGROUP_PARENT, CGROUPS, Containerd
from kit.kata import RUN_PREFIX, Result, wait_for
from kit.leaks import claim
from kit.oci_archive import BUSYBOX

__all__ = ["RUNNING", "Cri", "CriError", "LogLine", "Pod", "mount"]

PROTO = Path(__file__).with_name("cri.proto")
SERVICES = ("runtime.v1.RuntimeService", "runtime.v1.ImageService")
CREATED, RUNNING, EXITED = 0, 1, 2  # states of a container
_numbers = itertools.count(1)


class CriError(Exception):
    """A call that containerd refused: its gRPC status and what it says."""

    def __init__(self, method: str, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{method}: {code.name}: {details}")
        self.code, self.details = code, details


class LogLine(NamedTuple):
    """One line of a container's log in the format of the CRI."""

    time: str
    stream: str
    tag: str  # F, a full line, or P, a part of one
    text: str


class _Method(NamedTuple):
    path: str
    request: Any  # classes of messages
    response: Any


@functools.cache
def _methods() -> dict[str, _Method]:
    """The CRI's methods by name.

    The classes are made once and kept: protobuf holds those that are made on demand weakly, and a thread that asks for
    one while another collects it as garbage brings the process down.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "descriptors"
        code = protoc.main(["protoc", f"-I{PROTO.parent}", f"--descriptor_set_out={out}", PROTO.name])
        assert code == 0, f"cannot compile {PROTO}"
        files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.AddSerializedFile(file.SerializeToString())
    _classes.update(message_factory.GetMessageClassesForFiles([file.name for file in files.file], pool))
    return {
        method.name: _Method(
            f"/{service}/{method.name}", _classes[method.input_type.full_name], _classes[method.output_type.full_name]
        )
        for service in SERVICES
        for method in pool.FindServiceByName(service).methods
    }


_classes: dict[str, Any] = {}


class Cri:
    """Pods of one runtime handler. Remembers the pods that it made, to remove them at the end."""

    def __init__(self, node: Containerd, handler: str) -> None:
        self.node, self.handler = node, handler
        self._channel = grpc.insecure_channel(f"unix://{node.socket}")
        self._pods: list[Pod] = []
        self.wait_serves()

    def wait_serves(self) -> None:
        """The CRI plugin first learns what there is, and refuses calls meanwhile."""

        def serves() -> bool:
            try:
                conditions = self("Status").status.conditions
            except CriError as exc:
                if exc.code in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE):
                    return False
                raise
            return all(one.status for one in conditions)

        wait_for(serves, "the CRI serves")

    def __call__(self, method: str, *, limit_s: float = 180, **fields: Any) -> Any:
        """Call `method` with a request of these fields; returns the response. Raises CriError."""
        called = _methods()[method]
        request = called.request(**fields)
        stub: Any = self._channel.unary_unary(
            called.path,
            request_serializer=called.request.SerializeToString,
            response_deserializer=called.response.FromString,
        )
        self.node.note(f"CRI {method} {' '.join(str(request).split())}")
        try:
            answer = stub(request, timeout=limit_s)
        except grpc.RpcError as exc:
            code, details = exc.code(), exc.details()
            self.node.note(f"  failed: {code.name}: {details}")
            raise CriError(method, code, details or "") from exc
        self.node.note(f"  {' '.join(str(answer).split())[:2000]}")
        return answer

    def run_pod(self, **options: Any) -> "Pod":
        """RunPodSandbox; see Pod for the options. It is removed at the end of the test."""
        pod = Pod(self, **options)
        self._pods.append(pod)
        pod.run()
        return pod

    def remove_all(self) -> None:
        """Stop and remove the pods that are left."""
        pods, self._pods = self._pods, []
        failures = []
        for pod in reversed(pods):
            try:
                pod.stop_and_remove()
            except CriError as exc:
                failures.append(str(exc))
        assert not failures, f"cannot remove pods: {failures}"

    def close(self) -> None:
        self._channel.close()


def mount(host: Path | str, container: str, *, readonly: bool = False, propagation: int = 0) -> dict[str, Any]:
    """A volume as the kubelet hands it over."""
    where = {"host_path": str(host), "container_path": container}
    return {**where, "readonly": readonly, "propagation": propagation}


class Pod:
    """One pod sandbox, made as the kubelet would: with a cgroup and a folder for logs of its own.

    `security`, `sysctls`: of the sandbox. `resources`: what its containers come to, as kubelets have announced it since
    1.23 (2 CPU shares: nothing). `config`: further fields of its PodSandboxConfig.
    """

    def __init__(
        self,
        cri: Cri,
        *,
        security: Mapping[str, Any] | None = None,
        sysctls: Mapping[str, str] | None = None,
        resources: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> None:
        number = next(_numbers)
        name = f"{RUN_PREFIX}pod{number}"
        self.cri, self.id, self.netns = cri, "", ""
        self.cgroup = f"{CGROUP_PARENT}/{name}"
        self.logs = cri.node.data_dir / "logs" / name
        linux = {"cgroup_parent": self.cgroup, "security_context": dict(security or {}), "sysctls": dict(sysctls or {})}
        if resources is not None:
            linux["resources"] = dict(resources)
        self.config: dict[str, Any] = {
            "metadata": {"name": name, "uid": f"{name}-uid", "namespace": "tests", "attempt": 0},
            "hostname": name,
            "log_directory": str(self.logs),
            "linux": linux,
            **config,
        }
        self._attempts = itertools.count()
        self._containers: list[str] = []

    def run(self) -> None:
        self.logs.mkdir(parents=True)
        for folder in self._cgroups():
            folder.mkdir()
        try:
            answer = self.cri("RunPodSandbox", config=self.config, runtime_handler=self.cri.handler)
        except CriError:
            self._remove_folders()
            raise
        self.id = answer.pod_sandbox_id
        claim(self.id)
        self.netns = self._find_netns()
        claim(os.path.basename(self.netns))

    # What it is

    def status(self) -> Any:
        return self.cri("PodSandboxStatus", pod_sandbox_id=self.id).status

    @property
    def addresses(self) -> list[str]:
        """IPv4 first."""
        network = self.status().network
        return [network.ip, *(other.ip for other in network.additional_ips)]

    def _find_netns(self) -> str:
        info = json.loads(self.cri("PodSandboxStatus", pod_sandbox_id=self.id, verbose=True).info["info"])
        paths = [one.get("path", "") for one in info["runtimeSpec"]["linux"]["namespaces"] if one["type"] == "network"]
        return paths[0] if paths else ""

    # Its containers

    def create(self, *command: str, name: str = "main", linux: Mapping[str, Any] | None = None, **config: Any) -> str:
        """CreateContainer of busybox; returns its id. `config`: further fields of its ContainerConfig."""
        attempt = next(self._attempts)
        full = {
            "metadata": {"name": name, "attempt": attempt},
            "image": {"image": BUSYBOX},
            "command": list(command),
            "log_path": f"{name}-{attempt}.log",
            "linux": dict(linux or {}),
            **config,
        }
        answer = self.cri("CreateContainer", pod_sandbox_id=self.id, config=full, sandbox_config=self.config)
        container: str = answer.container_id
        claim(container)
        self._containers.append(container)
        return container

    def start(self, *command: str, **options: Any) -> str:
        """CreateContainer and StartContainer; returns the id."""
        container = self.create(*command, **options)
        self.cri("StartContainer", container_id=container)
        return container

    def container(self, container: str) -> Any:
        """ContainerStatus."""
        return self.cri("ContainerStatus", container_id=container).status

    def wait_exit(self, container: str, limit_s: float = 180) -> int:
        """The exit code of a container, once it has ended."""
        wait_for(lambda: self.container(container).state == EXITED, f"container {container[:12]} ends", limit_s, 0.1)
        code: int = self.container(container).exit_code
        return code

    def run_once(self, *command: str, **options: Any) -> tuple[int, str]:
        """Run a container to its end: exit code and what it wrote, both streams together."""
        container = self.start(*command, **options)
        code = self.wait_exit(container)
        return code, "".join(f"{line.text}\n" for line in self.log(container))

    def exec(self, container: str, *command: str, limit_s: int = 60) -> Result:
        """ExecSync."""
        answer = self.cri("ExecSync", container_id=container, cmd=command, timeout=limit_s)
        return Result(answer.exit_code, answer.stdout.decode(), answer.stderr.decode())

    def sh(self, container: str, script: str) -> str:
        """What a script says that has to succeed in the container."""
        result = self.exec(container, "sh", "-c", script)
        assert result.code == 0, f"{script}: {result}"
        return result.stdout

    def log(self, container: str) -> list[LogLine]:
        text = Path(self.container(container).log_path).read_text()
        return [LogLine(*line.split(" ", 3)) for line in text.splitlines()]

    def log_text(self, container: str) -> list[str]:
        return [line.text for line in self.log(container)]

    def remove_container(self, container: str, grace_s: int = 0) -> None:
        self.cri("StopContainer", container_id=container, timeout=grace_s)
        self.cri("RemoveContainer", container_id=container)

    def remove_containers(self) -> None:
        """Remove all of them, running or not; one that is gone already does no harm."""
        containers, self._containers = self._containers, []
        for container in reversed(containers):
            self.cri("RemoveContainer", container_id=container)

    # Its end

    def stop_and_remove(self) -> None:
        """StopPodSandbox, RemovePodSandbox; once more does nothing."""
        if self.id:
            self.cri("StopPodSandbox", pod_sandbox_id=self.id)
            self.cri("RemovePodSandbox", pod_sandbox_id=self.id)
            self.id = ""
            self._remove_folders()

    def _remove_folders(self) -> None:
        shutil.rmtree(self.logs, ignore_errors=True)
        for folder in self._cgroups():
            if folder.exists():  # of all that is below it, nothing may be left
                wait_for(lambda folder=folder: _removed(folder), f"{folder} is empty of cgroups and processes")

    def _cgroups(self) -> Sequence[Path]:
        parents = (hierarchy / CGROUP_PARENT.strip("/") for hierarchy in sorted(CGROUPS.iterdir()))
        return [parent / os.path.basename(self.cgroup) for parent in parents if parent.is_dir()]


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True
