"""A Kubernetes with one real node: kit.control_plane, and a kubelet and a kube-proxy on a kit.cluster_node.

    network namespace of the node:  lo (the node's address): all daemons
                                    kt0 (bridge) --- veth --- pods

The control plane has the mount namespace of the test; kubelet, kube-proxy and containerd have the node's. What a
kubelet sets for a whole machine it finds in files of its own over /proc/sys. The programs are those of
kit.control_plane.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kit.cluster_node import ClusterNode, cluster_node_running
from kit.control_plane import (
    BIN,
    ApiError,
    ControlPlane,
    Placement,
    control_plane_running,
    missing_programs,
    version,
)
from kit.kata import RUN_PREFIX, wait_for
from kit.oci_archive import BUSYBOX
from kit.pod_network import in_netns, open_netns
from kit.terminal import Terminal, open_terminal

__all__ = [
    "NODE",
    "OVERHEAD_CPU_MILLIS",
    "OVERHEAD_MIB",
    "RUNTIME_CLASS",
    "Kubernetes",
    "Namespace",
    "container",
    "deployment",
    "kubernetes_running",
    "needs_kubelet",
    "pod",
]

NODE = "node-1"
ADDRESS = "10.88.8.1"
SERVICES = "10.0.0.0/24"  # of kit.control_plane
CGROUPS = Path("/sys/fs/cgroup")
OVERHEAD_MIB = 250
OVERHEAD_CPU_MILLIS = 20
RUNTIME_CLASS = {
    "apiVersion": "node.k8s.io/v1",
    "kind": "RuntimeClass",
    "metadata": {"name": "kata"},
    "handler": "kata",
    "overhead": {"podFixed": {"memory": f"{OVERHEAD_MIB}Mi", "cpu": f"{OVERHEAD_CPU_MILLIS}m"}},
}
SYSCTLS = (
    *("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops"),
    *("kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"),
)
"""What a kubelet sets for the whole machine, as it starts."""
KUBELET = """
set -e
mount --make-private /proc # what is mounted elsewhere is seen by containerd, as on any node
for key in {keys}; do
    mkdir -p "{files}/$(dirname $key)"
    cat "/proc/sys/$key" > "{files}/$key"
    mount --bind "{files}/$key" "/proc/sys/$key"
done
exec {command} >> {log} 2>&1
"""
LIMIT_S = 600.0
_numbers = itertools.count(1)

needs_kubelet = missing_programs("kubelet", "kube-proxy")


@functools.cache
def _flags(program: str) -> frozenset[str]:
    """The long options that a program has: they come and go with its version."""
    done = subprocess.run([BIN / program, "--help"], capture_output=True, text=True, check=True)
    return frozenset(re.findall(r"^ +(?:-\w, )?--([a-z0-9-]+)", done.stdout + done.stderr, re.MULTILINE))


class Kubernetes:
    def __init__(self, node: ClusterNode, plane: ControlPlane, *, cgroup: str) -> None:
        self.node, self.plane = node, plane
        self.cgroup = cgroup
        self.log = node.data / "kubelet.log"
        self._kubelet: subprocess.Popen[bytes] | None = None
        self._proxy: subprocess.Popen[bytes] | None = None

    # Its life

    def start(self) -> None:
        self.start_kubelet()
        self._start_proxy()
        try:
            wait_for(self.is_ready, "the node is Ready", LIMIT_S, 0.5)
        except AssertionError as exc:
            raise AssertionError(f"{exc}; the kubelet's log ends: {self.log_tail()}") from exc
        if self.node.installed:
            self.apply(RUNTIME_CLASS)

    def start_kubelet(self) -> None:
        """Also again, after `stop_kubelet`."""
        config = self.node.data / "kubelet.json"
        config.write_text(json.dumps(self._kubelet_config(), indent=1))
        resolv = self.node.data / "resolv.conf"
        resolv.write_text("nameserver 10.88.8.53\n")
        options = {
            "config": str(config),
            "kubeconfig": str(self.plane.kubelet),
            "hostname-override": NODE,
            "node-ip": ADDRESS,
            "container-runtime": "remote",
            "container-runtime-endpoint": "unix:///run/containerd/containerd.sock",
            "v": "2",
        }
        has = _flags("kubelet")
        command = [str(BIN / "kubelet"), *(f"--{name}={value}" for name, value in options.items() if name in has)]
        script = KUBELET.format(
            keys=" ".join(SYSCTLS), files=self.node.data / "sysctls", command=shlex.join(command), log=self.log
        )
        # in the node's mount namespace a mount over /proc/sys would hide the kernel's values from all others as well
        own = ["unshare", "--mount", "--propagation", "unchanged", "sh", "-c", script]
        self._kubelet = subprocess.Popen(self.node.command(*own), stdin=subprocess.DEVNULL, start_new_session=True)

    def _kubelet_config(self) -> dict[str, Any]:
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            # whoever is in its network namespace is a test, or a pod of one
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup}",
            "failSwapOn": False,
            "makeIPTablesUtilChains": False,
            "resolvConf": str(self.node.data / "resolv.conf"),
            "volumePluginDir": str(self.node.data / "volume-plugins"),
            "syncFrequency": "5s",
            "nodeStatusUpdateFrequency": "5s",
            "runtimeRequestTimeout": "10m",
            "oomScoreAdj": int(
                Path("/proc/self/oom_score_adj").read_text()
            ),  # as it is: to lower it takes a capability
            # this machine's memory and disk are not the tests'
            "evictionHard": dict.fromkeys(("memory.available", "nodefs.available", "imagefs.available"), "0%"),
            "imageGCHighThresholdPercent": 100,
        }
        if version("kubelet") >= (1, 31):
            config["failCgroupV1"] = False
        return config

    def stop_kubelet(self, by: signal.Signals = signal.SIGTERM) -> None:
        """Pods live on."""
        if self._kubelet is not None:
            _end(self._kubelet, by)
            self._kubelet = None

    def _start_proxy(self) -> None:
        options = {
            "kubeconfig": str(self.plane.admin),
            "hostname-override": NODE,
            "proxy-mode": "iptables",
            "masquerade-all": "true",  # pods are on one bridge, past iptables
            # limits of connection tracking that are the whole machine's
            "conntrack-max-per-core": "0",
            "conntrack-min": "0",
            "conntrack-tcp-timeout-established": "0s",
            "conntrack-tcp-timeout-close-wait": "0s",
        }
        command = [str(BIN / "kube-proxy"), *(f"--{name}={value}" for name, value in options.items())]
        with (self.node.data / "kube-proxy.log").open("ab") as log:
            self._proxy = subprocess.Popen(
                self.node.command(*command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def is_ready(self) -> bool:
        assert self._kubelet is not None
        assert self._kubelet.poll() is None, f"the kubelet has ended with {self._kubelet.returncode}: {self.log_tail()}"
        try:
            conditions = self.plane.ask("GET", f"/api/v1/nodes/{NODE}")["status"].get("conditions", [])
        except (ApiError, OSError):
            return False
        return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

    def stop(self) -> None:
        """kubelet and kube-proxy; pods live on."""
        if self._proxy is not None:
            _end(self._proxy, signal.SIGTERM)
        self.stop_kubelet()

    # Its use

    def kubectl(self, *args: str, **options: Any) -> str:
        """`kubectl ARGS`, which has to succeed; returns its stdout."""
        return self.plane.kubectl(*args, **options).stdout

    def apply(self, *objects: Mapping[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", text=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def host(self, *argv: str) -> str:
        """`argv` on the node, which has to succeed."""
        return self.node.ok(*argv)

    def sandboxes(self) -> list[str]:
        """All that is there of VMs on the node."""
        roots = ("/run/vc/sbs", "/run/vc/vm", "/run/kata-containers/shared/sandboxes", "/run/netns")
        found = []
        for root in roots:
            with contextlib.suppress(FileNotFoundError):
                found += [f"{root}/{name}" for name in os.listdir(self.node.path(root)) if name != "template"]
        return found

    def log_tail(self, characters: int = 4000) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else "(none)"
        # what it dies of comes before the stacks of hundreds of goroutines
        if fatal := re.search(r"^(F\d{4} |panic:).*", text, re.MULTILINE):
            return text[max(0, fatal.start() - characters) : fatal.end()]
        return text[-characters:]

    def save_evidence(self, folder: Path) -> None:
        """Logs and what the cluster says, for a failed test."""
        for log in (*self.node.data.glob("*.log"), *self.plane.directory.glob("kube-*.log")):
            (folder / log.name).write_text(log.read_text(errors="replace")[-1_000_000:])
        for what in ("pods", "events"):
            said = self.plane.kubectl("get", what, "--all-namespaces", "-o", "wide", check=False)
            (folder / f"{what}.txt").write_text(said.stdout + said.stderr)


class Namespace:
    """A namespace of the cluster for one test, with what kubectl does in it."""

    def __init__(self, cluster: Kubernetes) -> None:
        self.cluster, self.plane = cluster, cluster.plane
        self.name = f"test-{next(_numbers)}"
        self.root = f"/api/v1/namespaces/{self.name}"

    def open(self) -> None:
        self.plane.ask("POST", "/api/v1/namespaces", {"metadata": {"name": self.name}})
        wait_for(lambda: self.exists("serviceaccounts/default"), "the namespace has its account", LIMIT_S)

    def close(self) -> None:
        """Delete all of it; returns when the last pod and the last VM are gone.

        By force: otherwise a kubelet of 1.20 keeps a pod until it collects the garbage of sandboxes, once a minute.
        """
        self.kubectl("delete", "namespace", self.name, "--wait=false")

        def emptied() -> bool:
            if self.pods():
                self.kubectl("delete", "pods", "--all", "--grace-period=0", "--force", "--wait=false")
            return not self.pods()

        wait_for(emptied, f"the pods of {self.name} go", LIMIT_S, 0.2)
        wait_for(lambda: not self.cluster.sandboxes(), f"the sandboxes of {self.name} go", LIMIT_S, 0.2)

    def exists(self, path: str) -> bool:
        try:
            return bool(self.plane.ask("GET", f"{self.root}/{path}"))
        except ApiError as exc:
            if exc.code == 404:
                return False
            raise

    def pods(self, **labels: str) -> list[dict[str, Any]]:
        chosen = ",".join(f"{key}%3D{value}" for key, value in labels.items())
        return self.plane.items(f"{self.root}/pods?labelSelector={chosen}")

    def get(self, name: str) -> dict[str, Any]:
        """A pod."""
        return self.plane.ask("GET", f"{self.root}/pods/{name}")

    def status(self, name: str, container: int = 0) -> dict[str, Any]:
        """Of a container of a pod."""
        found: dict[str, Any] = self.get(name)["status"]["containerStatuses"][container]
        return found

    def kubectl(self, *args: str, **options: Any) -> str:
        return self.cluster.kubectl("--namespace", self.name, *args, **options)

    def command(self, *args: str) -> list[str]:
        return self.plane.kubectl_command("--namespace", self.name, *args)

    def apply(self, *objects: Mapping[str, Any]) -> None:
        within = [{**one, "metadata": {"namespace": self.name, **one["metadata"]}} for one in objects]
        self.cluster.apply(*within)

    def start(self, name: str, *command: str, **options: Any) -> None:
        """A pod of `pod`, Ready."""
        self.apply(pod(name, *command, **options))
        self.wait_ready(name)

    def wait_ready(self, *names: str) -> None:
        self.wait("condition=Ready", *(f"pod/{name}" for name in names))

    def wait(self, what: str, *objects: str) -> None:
        """As `kubectl wait --for=WHAT`; with what kubectl describes if it does not come."""
        words = ("wait", f"--for={what}", f"--timeout={LIMIT_S:g}s", *objects)
        done = self.plane.kubectl("--namespace", self.name, *words, check=False, limit_s=LIMIT_S + 60)
        if done.returncode != 0:
            described = self.plane.kubectl("--namespace", self.name, "describe", "pods", check=False).stdout
            raise AssertionError(f"{done.stderr}{described[-6000:]}")

    def wait_phase(self, name: str, phase: str) -> dict[str, Any]:
        """The pod, when it has come to that."""

        def reached() -> dict[str, Any] | None:
            found = self.get(name)
            return found if found["status"]["phase"] == phase else None

        found: dict[str, Any] = wait_for(reached, f"pod {name} is {phase}", LIMIT_S, 0.2)
        return found

    def wait_gone(self, name: str) -> None:
        wait_for(lambda: not self.exists(f"pods/{name}"), f"pod {name} goes", LIMIT_S, 0.2)

    def exec(self, pod: str, *command: str, container: str = "main") -> str:
        return self.kubectl("exec", pod, "-c", container, "--", *command)

    def sh(self, pod: str, script: str, container: str = "main") -> str:
        return self.exec(pod, "sh", "-c", script, container=container)

    def wait_says(self, pod: str, script: str, words: str, container: str = "main") -> None:
        """Until the script writes these words; it may fail before, and what it is about may come later."""

        def says() -> bool:
            done = self.plane.kubectl(
                *("--namespace", self.name, "exec", pod, "-c", container, "--", "sh", "-c", script), check=False
            )
            return done.returncode == 0 and done.stdout.split() == words.split()

        wait_for(says, f"{script!r} in {pod} says {words!r}", LIMIT_S, 0.5)

    def logs(self, pod: str, *options: str) -> str:
        return self.kubectl("logs", pod, *options)

    @contextlib.contextmanager
    def spawn(self, *args: str) -> Iterator["subprocess.Popen[str]"]:
        """`kubectl ARGS` while the block runs."""
        pipe = subprocess.PIPE
        with subprocess.Popen(self.command(*args), stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    def terminal(self, *args: str) -> contextlib.AbstractContextManager[Terminal]:
        """`kubectl ARGS` in a terminal of its own."""
        return open_terminal(self.command(*args))


def container(name: str, *command: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "image": BUSYBOX, "imagePullPolicy": "Never", "command": list(command), **fields}


def pod(
    name: str,
    *command: str,
    labels: Mapping[str, str] | None = None,
    main: Mapping[str, Any] | None = None,
    beside: Iterable[Mapping[str, Any]] = (),
    **spec: Any,
) -> dict[str, Any]:
    """A pod in a VM: `command` in the container `main`, whose further fields `main` has; `spec`: those of the pod."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": dict(labels or {})},
        "spec": {
            "runtimeClassName": "kata",
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 1,
            "containers": [container("main", *command, **(main or {})), *beside],
            **spec,
        },
    }


def deployment(name: str, replicas: int, *command: str, **options: Any) -> dict[str, Any]:
    """One whose pods are those of `pod`, with the label app."""
    template = pod(name, *command, **options, labels={"app": name})
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}}, "spec": template["spec"]},
        },
    }


def _end(process: "subprocess.Popen[bytes]", by: signal.Signals) -> None:
    process.send_signal(by)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _hierarchies(cgroup: str) -> Iterator[Path]:
    for hierarchy in sorted(CGROUPS.iterdir()):
        if hierarchy.is_dir() and not hierarchy.is_symlink():
            yield hierarchy / cgroup


@contextlib.contextmanager
def _cgroup(name: str) -> Iterator[None]:
    """One in each hierarchy; what is in use at the end stays, for the leak probe to find."""
    for folder in _hierarchies(name):
        folder.mkdir()
    try:
        yield
    finally:
        for top in _hierarchies(name):
            for path, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(path)


@contextlib.contextmanager
def kubernetes_running(directory: Path, *, installed: bool = True) -> Iterator[Kubernetes]:
    """A cluster whose node is Ready. `installed`: with Katapod of this work tree as the handler kata."""
    name = f"{RUN_PREFIX}k{next(_numbers)}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(open_netns(name))
        subprocess.run(in_netns(name, ["ip", "address", "add", f"{ADDRESS}/32", "dev", "lo"]), check=True)
        # as a node's default route would: from there on kube-proxy's rules send what is for Services elsewhere
        subprocess.run(in_netns(name, ["ip", "route", "add", SERVICES, "dev", "lo"]), check=True)
        plane = stack.enter_context(control_plane_running(directory, Placement(name, ADDRESS, NODE)))
        stack.enter_context(_cgroup(name))
        node = stack.enter_context(cluster_node_running(name, installed=installed))
        found = Kubernetes(node, plane, cgroup=name)
        stack.callback(found.stop)
        found.start()
        yield found
