"""A control plane of Kubernetes for tests: real etcd, API server, controllers and scheduler, with RBAC.

By itself it has no kubelet: nodes are objects that a test makes, and SimulatedKubelet says of their pods what a kubelet
would say. kit.kubernetes adds a real one. The programs are those of `tools/build-kubernetes`, or of KUBERNETES_BIN,
where etcd may be too.
"""

import contextlib
import functools
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kit.cri_stream import connect_inside
from kit.kata import wait_for
from kit.pod_network import in_netns

__all__ = [
    "BIN",
    "ApiError",
    "ControlPlane",
    "Placement",
    "SimulatedKubelet",
    "control_plane_running",
    "missing_programs",
    "needs_control_plane",
    "version",
]

ROOTS = Path(os.environ.get("KATAPOD_TEST_ROOTS", "/var/cache/katapod-tests"))
BIN = Path(os.environ.get("KUBERNETES_BIN") or ROOTS / "kubernetes/1.20.2")
NEEDED = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
NAMESPACE = "katapod"
OPERATOR = f"system:serviceaccount:{NAMESPACE}:katapod-operator"
CONTROLLERS = "job,garbagecollector,serviceaccount,namespace"  # none that would miss the heartbeats of kubelets
API_END_S = 3.0
START_LIMIT_S = 600.0


def _etcd() -> str | None:
    return str(BIN / "etcd") if (BIN / "etcd").exists() else shutil.which("etcd")


def missing_programs(*more: str) -> pytest.MarkDecorator:
    """The mark that skips tests where the control plane's programs, or one of `more`, are not there."""
    missing = [name for name in (*NEEDED, *more) if not (BIN / name).exists()] + ([] if _etcd() else ["etcd"])
    return pytest.mark.skipif(
        bool(missing), reason=f"no Kubernetes here, {', '.join(missing)} not in {BIN}: tools/build-kubernetes"
    )


needs_control_plane = missing_programs()


class ApiError(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a control plane runs: beside the kubelet of `node`, in the network namespace of that, at its address."""

    netns: str
    address: str
    node: str


class ControlPlane:
    """With a placement it expects a real kubelet, and has all controllers and the rules for nodes; without, none."""

    def __init__(self, directory: Path, placement: Placement | None = None) -> None:
        self.directory = directory
        self.placement = placement
        self.address = placement.address if placement else "127.0.0.1"
        self.port = _free_port()
        self._etcd_ports = _free_port(), _free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.admin = directory / "admin.conf"
        self.operator = directory / "operator.conf"
        self.kubelet = directory / "kubelet.conf"

    def start(self) -> None:
        key = self.directory / "service-account.key"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        tokens = f'admin-token,admin,1,"system:masters"\noperator-token,{OPERATOR},2,"system:serviceaccounts"\n'
        if self.placement:
            tokens += f'kubelet-token,system:node:{self.placement.node},3,"system:nodes"\n'
        (self.directory / "tokens.csv").write_text(tokens)
        client, peer = (f"http://127.0.0.1:{port}" for port in self._etcd_ports)
        self._spawn(
            str(_etcd()),
            f"--data-dir={self.directory}/etcd",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
        )
        self.start_api()
        for file in (self.admin, self.operator, *([self.kubelet] if self.placement else [])):
            self._write_kubeconfig(file, f"{file.stem}-token")
        common = [f"--kubeconfig={self.admin}", "--leader-elect=false", "--secure-port=0"]
        if version("kube-apiserver") < (1, 24):
            common.append("--port=0")  # without TLS; later there was none
        self._spawn(
            str(BIN / "kube-controller-manager"),
            *common,
            f"--controllers={'*' if self.placement else CONTROLLERS}",
            "--kube-api-qps=500",  # of nodes by the hundred; 20 by default
            "--kube-api-burst=1000",
            f"--service-account-private-key-file={key}",
            f"--root-ca-file={self._certificate()}",
        )
        self._spawn(str(BIN / "kube-scheduler"), *common)
        wait_for(self._has_default_account, "the controllers are at work", START_LIMIT_S)

    def start_api(self) -> None:
        policy = {
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived"],
            "rules": [{"level": "Metadata", "users": [OPERATOR]}, {"level": "None"}],
        }
        (self.directory / "audit.json").write_text(json.dumps(policy))
        key = self.directory / "service-account.key"
        self._spawn(
            str(BIN / "kube-apiserver"),
            f"--etcd-servers=http://127.0.0.1:{self._etcd_ports[0]}",
            f"--secure-port={self.port}",
            *self._access(),
            f"--cert-dir={self.directory}/certificates",
            f"--token-auth-file={self.directory}/tokens.csv",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--allow-privileged=true",
            f"--audit-policy-file={self.directory}/audit.json",
            f"--audit-log-path={self.directory}/audit.log",
        )
        wait_for(self._answers, f"the API server answers: {self.directory}/kube-apiserver.log", START_LIMIT_S)

    def _access(self) -> list[str]:
        """Who reaches the API server and who may what: without a kubelet neither pods nor nodes do."""
        if self.placement is None:
            return ["--bind-address=127.0.0.1", "--authorization-mode=RBAC"]
        return [
            "--bind-address=0.0.0.0",  # its certificate is for the advertised address then
            f"--advertise-address={self.address}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--kubelet-preferred-address-types=InternalIP",
        ]

    def stop_api(self) -> None:
        self._end("kube-apiserver")

    def stop(self) -> None:
        for name in reversed(list(self._processes)):
            self._end(name)

    def _spawn(self, *argv: str) -> None:
        name = Path(argv[0]).name
        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                self.command(*argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def command(self, *argv: str) -> list[str]:
        """`argv` where the API server can be reached."""
        return in_netns(self.placement.netns, argv) if self.placement else list(argv)

    def _end(self, name: str) -> None:
        """An API server that is asked to end waits a minute for those who watch; that is cut short, as by a host."""
        process = self._processes.pop(name)
        process.send_signal(signal.SIGKILL if name == "etcd" else signal.SIGTERM)
        try:
            process.wait(API_END_S if name == "kube-apiserver" else 60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _answers(self) -> bool:
        if (code := self._processes["kube-apiserver"].poll()) is not None:
            raise AssertionError(f"kube-apiserver has ended with {code}: {self.directory}/kube-apiserver.log")
        try:  # it answers before it knows of custom resources: /readyz waits for those
            with self._request("GET", "/readyz", None) as answer:
                return bool(answer.status == 200 and self.ask("GET", "/api/v1/namespaces/default"))
        except (ApiError, OSError):
            return False

    def _has_default_account(self) -> bool:
        try:
            return bool(self.ask("GET", "/api/v1/namespaces/default/serviceaccounts/default"))
        except ApiError:
            return False

    def _write_kubeconfig(self, path: Path, token: str) -> None:
        cluster = {"server": f"https://{self.address}:{self.port}", "certificate-authority": str(self._certificate())}
        value = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tests", "cluster": cluster}],
            "users": [{"name": "user", "user": {"token": token}}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "user"}}],
            "current-context": "tests",
        }
        path.write_text(json.dumps(value))

    def _certificate(self) -> Path:
        return self.directory / "certificates/apiserver.crt"

    def ask(self, method: str, path: str, body: Any = None, *, kind: str = "application/json") -> dict[str, Any]:
        """As an administrator. Raises ApiError, or OSError if there is no API server."""
        try:
            with self._request(method, path, body, kind=kind) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as exc:
            raise ApiError(exc.code, exc.read().decode(errors="replace")) from None
        return found

    def _request(self, method: str, path: str, body: Any, *, kind: str = "application/json") -> Any:
        request = urllib.request.Request(
            f"https://{self.address}:{self.port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": "Bearer admin-token", "Content-Type": kind},
        )
        context = ssl.create_default_context(cafile=str(self._certificate()))
        netns = self.placement.netns if self.placement else None
        connection = functools.partial(_Connection, context=context, netns=netns)
        return urllib.request.build_opener(_Https(connection)).open(request, timeout=180)

    def merge(self, path: str, patch: Any) -> dict[str, Any]:
        return self.ask("PATCH", path, patch, kind="application/merge-patch+json")

    def items(self, path: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("GET", path)["items"]
        return found

    def operator_requests(self) -> list[tuple[str, str]]:
        """Verb and path of each request of the operator's account until now."""
        log = self.directory / "audit.log"  # made with its first line
        lines = log.read_text().rpartition("\n")[0].splitlines() if log.exists() else []
        return [(one["verb"], one["requestURI"]) for one in map(json.loads, lines)]

    def kubectl(
        self, *args: str, text: str | None = None, check: bool = True, limit_s: float = 240
    ) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            self.kubectl_command(*args), input=text, text=True, capture_output=True, timeout=limit_s, check=False
        )
        assert not check or done.returncode == 0, f"{args}: {done.stderr}"
        return done

    def kubectl_command(self, *args: str) -> list[str]:
        """`kubectl ARGS` as an administrator."""
        options = [f"--kubeconfig={self.admin}", f"--cache-dir={self.directory}/cache"]
        return self.command(str(BIN / "kubectl"), *options, *args)

    def add_node(self, name: str, **labels: str) -> None:
        """A node as its kubelet would register it: Ready, with room for pods."""
        room = {"cpu": "4", "memory": "8Gi", "pods": "110"}
        all_labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", **labels}
        self.ask("POST", "/api/v1/nodes", {"metadata": {"name": name, "labels": all_labels}})
        condition = {"type": "Ready", "status": "True", "reason": "Simulated"}
        self.merge(
            f"/api/v1/nodes/{name}/status",
            {"status": {"capacity": room, "allocatable": room, "conditions": [condition]}},
        )
        self.merge(f"/api/v1/nodes/{name}", {"spec": {"taints": None}})  # of nodes that have just come


class _Connection(http.client.HTTPSConnection):
    """One that is made in a network namespace, where there is one."""

    def __init__(self, host: str, *, netns: str | None, context: ssl.SSLContext, **options: Any) -> None:
        super().__init__(host, context=context, **options)
        self._netns, self._ssl = netns, context

    def connect(self) -> None:
        if self._netns is None:
            super().connect()
            return
        plain = connect_inside(self._netns, self.host, self.port)
        plain.settimeout(self.timeout)
        self.sock = self._ssl.wrap_socket(plain, server_hostname=self.host)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, connection: Callable[..., _Connection]) -> None:
        super().__init__()
        self._connection = connection

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)


class SimulatedKubelet:
    """What the kubelets of all nodes would say of the pods of node jobs. It runs nothing.

    `outcome(action, node)` is the termination message and whether the container ended well; None: it runs on.
    """

    def __init__(self, plane: ControlPlane, outcome: Callable[[str, str], tuple[str, bool] | None]) -> None:
        self.plane = plane
        self.outcome = outcome
        self.ran: list[tuple[str, str]] = []  # action and node of every pod that has been started
        self.commands: dict[str, list[str]] = {}  # of the last one on each node
        self._started: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="simulated kubelet")

    def __enter__(self) -> "SimulatedKubelet":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(0.1):
            with contextlib.suppress(OSError):  # no API server: as a kubelet, we try again
                for pod in self.plane.items(f"/api/v1/namespaces/{NAMESPACE}/pods"):
                    with contextlib.suppress(ApiError):  # it has gone meanwhile
                        self._sync(pod)

    def _sync(self, pod: dict[str, Any]) -> None:
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod['metadata']['name']}"
        if "deletionTimestamp" in pod["metadata"]:
            self.plane.ask("DELETE", path, {"gracePeriodSeconds": 0})
            return
        node = pod["spec"].get("nodeName")
        if not node or pod["status"]["phase"] in ("Succeeded", "Failed"):
            return
        command = self.commands[node] = pod["spec"]["containers"][0]["command"]
        action = command[1]
        if pod["metadata"]["uid"] not in self._started:
            self._started.add(pod["metadata"]["uid"])
            self.ran.append((action, node))
        ended = self.outcome(action, node)
        if ended is None:
            if pod["status"]["phase"] == "Pending":
                self.plane.merge(f"{path}/status", {"status": {"phase": "Running"}})
            return
        message, good = ended
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        state = {"exitCode": 0 if good else 1, "message": message, "startedAt": now, "finishedAt": now}
        container = {
            "name": "kata-node",
            "image": "simulated",
            "imageID": "",
            "ready": False,
            "restartCount": 0,
            "state": {"terminated": state},
        }
        phase = "Succeeded" if good else "Failed"
        self.plane.merge(f"{path}/status", {"status": {"phase": phase, "containerStatuses": [container]}})


@contextlib.contextmanager
def control_plane_running(directory: Path, placement: Placement | None = None) -> Iterator[ControlPlane]:
    plane = ControlPlane(directory, placement)
    try:
        plane.start()
        yield plane
    finally:
        plane.stop()


def version(program: str) -> tuple[int, int]:
    """Of one of the programs in BIN."""
    said = subprocess.run([BIN / program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"v(\d+)\.(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
