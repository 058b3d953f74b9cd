"""What a pod's spec may ask for, on a real kubelet: volumes, identity, security, probes, init containers."""

import base64
import json
from typing import Any

import pytest

from kit.kata import wait_for
from kit.kubernetes import Namespace, container, needs_kubelet, pod

pytestmark = [needs_kubelet, pytest.mark.timeout(1800)]

SLEEP = ("sleep", "infinity")
QUICK = {"periodSeconds": 1, "timeoutSeconds": 60}


def volume(name: str, path: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "mountPath": path, **fields}


def test_updates_of_config_maps_and_secrets_are_seen(ns: Namespace) -> None:
    ns.apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"key": "one", "sub": "fixed"}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"key": "eins"}},
    )
    mounts = [
        volume("config", "/config"),
        volume("secret", "/secret", readOnly=True),
        volume("config", "/etc/sub.conf", subPath="sub"),
    ]
    variable = {"name": "KEY", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "key"}}}
    ns.start(
        "one",
        *SLEEP,
        main={"volumeMounts": mounts, "env": [variable]},
        volumes=[
            {"name": "config", "configMap": {"name": "c"}},
            {"name": "secret", "secret": {"secretName": "s", "defaultMode": 0o400}},
        ],
    )
    read = "cat /config/key /secret/key /etc/sub.conf; echo $KEY; stat -L -c %a /secret/key"
    assert ns.sh("one", read) == "oneeinsfixedone\n400\n"
    ns.plane.merge(f"{ns.root}/configmaps/c", {"data": {"key": "two", "new": "more", "sub": "changed"}})
    ns.plane.merge(f"{ns.root}/secrets/s", {"data": {"key": base64.b64encode(b"zwei").decode()}})
    look = "for f in /config/key /config/new /secret/key /etc/sub.conf; do cat $f && echo; done; echo $KEY"
    ns.wait_says("one", look, "two more zwei fixed one")  # by subPath a file is what it was, and variables are
    assert "Read-only file system" in ns.sh("one", "touch /secret/x 2>&1 || true")


def test_the_downward_api(ns: Namespace) -> None:
    def of_field(path: str) -> dict[str, Any]:
        return {"valueFrom": {"fieldRef": {"fieldPath": path}}}

    env = [
        {"name": "POD", **of_field("metadata.name")},
        {"name": "ADDRESS", **of_field("status.podIP")},
        {"name": "ON", **of_field("spec.nodeName")},
        {"name": "LIMIT", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
    ]
    items = [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]
    ns.start(
        "one",
        *SLEEP,
        labels={"tier": "first"},
        main={
            "env": env,
            "resources": {"limits": {"memory": "96Mi"}},
            "volumeMounts": [volume("info", "/info")],
        },
        volumes=[{"name": "info", "downwardAPI": {"items": items}}],
    )
    address = ns.get("one")["status"]["podIP"]
    assert ns.sh("one", "echo $POD $ADDRESS $ON $LIMIT").split() == ["one", address, "node-1", "96"]
    assert ns.sh("one", "cat /info/labels") == 'tier="first"'
    ns.plane.merge(f"{ns.root}/pods/one", {"metadata": {"labels": {"tier": "second"}}})
    ns.wait_says("one", "cat /info/labels", 'tier="second"')


def test_a_projected_token(ns: Namespace) -> None:
    """Of the pod alone, and the API server takes it."""
    token = {"serviceAccountToken": {"path": "token", "audience": "https://kubernetes.default.svc"}}
    ns.start(
        "one",
        *SLEEP,
        main={"volumeMounts": [volume("identity", "/identity")]},
        volumes=[{"name": "identity", "projected": {"sources": [token]}}],
    )
    found = ns.sh("one", "cat /identity/token")
    payload = found.split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    assert claims["kubernetes.io"]["pod"]["name"] == "one"
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": found}}
    said = ns.plane.ask("POST", "/apis/authentication.k8s.io/v1/tokenreviews", review)
    assert said["status"]["authenticated"]
    assert said["status"]["user"]["username"] == f"system:serviceaccount:{ns.name}:default"


def test_the_token_of_the_account(ns: Namespace) -> None:
    """As pods have it that say nothing of it; by it they ask the API server, at the address of its Service."""
    wait_for(
        lambda: (
            ns.plane.kubectl(
                *("-n", ns.name, "apply", "-f", "-"),
                text=json.dumps(pod("one", *SLEEP, automountServiceAccountToken=True)),
                check=False,
            ).returncode
            == 0
        ),
        "the account has its token",
        period_s=0.5,
    )
    ns.wait_ready("one")
    folder = "/var/run/secrets/kubernetes.io/serviceaccount"
    assert ns.sh("one", f"cat {folder}/namespace") == ns.name
    assert "BEGIN CERTIFICATE" in ns.sh("one", f"cat {folder}/ca.crt")
    assert ns.sh("one", f"cat {folder}/token").count(".") == 2
    assert (
        ns.sh("one", "nc -w 60 $KUBERNETES_SERVICE_HOST $KUBERNETES_SERVICE_PORT < /dev/null && echo reached")
        == "reached\n"
    )


def test_empty_dirs(ns: Namespace) -> None:
    """Shared by containers, also after one is started again; one is in the node's memory."""
    mounts = [volume("disk", "/disk"), volume("memory", "/memory"), volume("disk", "/part", subPath="part")]
    ns.start(
        "one",
        *("sh", "-c", "echo start >> /disk/starts; until test -e /tmp/end; do sleep 0.1; done"),
        main={"volumeMounts": mounts},
        beside=[container("other", *SLEEP, volumeMounts=mounts[:2])],
        volumes=[
            {"name": "disk", "emptyDir": {}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    )
    ns.sh("one", "echo a > /disk/f; echo b > /memory/f; echo c > /part/f")
    ns.wait_says("one", "cat /disk/f /memory/f /disk/part/f", "a b c", "other")
    path = f"/var/lib/kubelet/pods/{ns.get('one')['metadata']['uid']}/volumes/kubernetes.io~empty-dir/memory"
    assert ns.cluster.host("stat", "-f", "-c", "%T", path) == "tmpfs\n"
    assert ns.cluster.host("cat", f"{path}/f") == "b\n"
    ns.sh("one", "touch /tmp/end")
    wait_for(lambda: ns.status("one")["restartCount"] == 1, "the container is started again", period_s=0.5)
    ns.wait_ready("one")
    for each in ("main", "other"):
        ns.wait_says("one", "cat /disk/f /memory/f /disk/starts", "a b start start", each)


def test_host_paths(ns: Namespace) -> None:
    path = f"{ns.cluster.node.data}/shared-{ns.name}"
    ns.start(
        "one",
        *SLEEP,
        main={"volumeMounts": [volume("host", "/host"), volume("file", "/file", readOnly=True)]},
        volumes=[
            {"name": "host", "hostPath": {"path": path, "type": "DirectoryOrCreate"}},
            {"name": "file", "hostPath": {"path": "/etc/passwd", "type": "File"}},
        ],
    )
    ns.sh("one", "echo inside > /host/made")
    assert ns.cluster.host("cat", f"{path}/made") == "inside\n"
    ns.cluster.host("sh", "-c", f"echo outside > {path}/back")
    ns.wait_says("one", "cat /host/back", "outside")
    assert "root:" in ns.sh("one", "cat /file")
    assert "Read-only file system" in ns.sh("one", "touch /file 2>&1 || true")


def test_security_contexts(ns: Namespace) -> None:
    """User and groups, the group of volumes, capabilities, seccomp, a root that is read-only."""
    ns.start(
        "one",
        *SLEEP,
        main={
            "volumeMounts": [volume("data", "/data")],
            "securityContext": {
                "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]},
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
        },
        beside=[container("root", *SLEEP, securityContext={"runAsUser": 0, "runAsNonRoot": False})],
        securityContext={
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "runAsNonRoot": True,
            "fsGroup": 2000,
            "supplementalGroups": [44],
        },
        volumes=[{"name": "data", "emptyDir": {}}],
    )
    assert ns.sh("one", "id -u; id -g").split() == ["1000", "1000"]
    assert set(ns.sh("one", "id -G").split()) == {"1000", "44", "2000"}
    assert ns.sh("one", "touch /data/f && stat -c '%u %g' /data/f") == "1000 2000\n"
    assert "Read-only file system" in ns.sh("one", "touch /tmp/x 2>&1 || true")
    status = dict(line.split(":\t", 1) for line in ns.sh("one", "cat /proc/self/status").splitlines() if ":\t" in line)
    assert int(status["CapBnd"], 16) == 1 << 10  # CAP_NET_BIND_SERVICE
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert ns.sh("one", "id -u; grep Seccomp: /proc/self/status", container="root").split() == ["0", "Seccomp:", "0"]


def test_init_containers(ns: Namespace) -> None:
    """One after another, each to its end, before the others."""
    mounts = [volume("work", "/work")]
    ns.start(
        "one",
        "sh",
        "-c",
        "echo main >> /work/order; exec sleep infinity",
        main={"volumeMounts": mounts},
        initContainers=[
            container("first", "sh", "-c", "echo first >> /work/order", volumeMounts=mounts),
            container("second", "sh", "-c", "echo second >> /work/order", volumeMounts=mounts),
        ],
        volumes=[{"name": "work", "emptyDir": {}}],
    )
    assert ns.sh("one", "cat /work/order").split() == ["first", "second", "main"]
    states = ns.get("one")["status"]["initContainerStatuses"]
    assert [one["state"]["terminated"]["exitCode"] for one in states] == [0, 0]


def test_an_init_container_that_fails(ns: Namespace) -> None:
    ns.apply(pod("one", *SLEEP, initContainers=[container("init", "sh", "-c", "exit 4")], restartPolicy="Never"))
    found = ns.wait_phase("one", "Failed")
    assert found["status"]["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 4


def test_limits_and_ends(ns: Namespace) -> None:
    """One that needs more than its limit is killed inside, and said to be; the message of another is kept."""
    ns.apply(
        pod("eater", "tail", "/dev/zero", main={"resources": {"limits": {"memory": "48Mi"}}}, restartPolicy="Never"),
        pod("teller", "sh", "-c", "echo why > /dev/termination-log; exit 9", restartPolicy="Never"),
    )
    eaten = ns.wait_phase("eater", "Failed")["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (eaten["reason"], eaten["exitCode"]) == ("OOMKilled", 137)
    told = ns.wait_phase("teller", "Failed")["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (told["exitCode"], told["message"]) == (9, "why\n")


def test_a_liveness_probe_that_fails(ns: Namespace) -> None:
    probe = {"exec": {"command": ["test", "!", "-e", "/tmp/ill"]}, "failureThreshold": 2, **QUICK}
    ns.start("one", *SLEEP, main={"livenessProbe": probe})
    ns.exec("one", "touch", "/tmp/ill")
    wait_for(lambda: ns.status("one")["restartCount"] == 1, "the container is started again", period_s=0.5)
    ns.wait_ready("one")
    assert ns.sh("one", "test -e /tmp/ill || echo well") == "well\n"


def test_readiness_and_start_up_probes(ns: Namespace) -> None:
    """By HTTP and by TCP from the node; the first says who is an endpoint, the second when the others begin."""
    script = "until test -e /tmp/start; do sleep 0.1; done; mkdir /www; exec httpd -f -p 8080 -h /www"
    service = {"selector": {"app": "one"}, "ports": [{"port": 80, "targetPort": 8080}]}
    probes = {
        "startupProbe": {"tcpSocket": {"port": 8080}, "failureThreshold": 1000, **QUICK},
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8080}, "failureThreshold": 1, **QUICK},
        "livenessProbe": {"tcpSocket": {"port": 8080}, **QUICK},
    }
    ns.apply(
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "one"}, "spec": service},
        pod("one", "sh", "-c", script, labels={"app": "one"}, main=probes),
    )
    ns.wait_phase("one", "Running")
    assert not ns.status("one")["started"]
    ns.exec("one", "touch", "/tmp/start")
    wait_for(lambda: ns.status("one")["started"], "the start is seen", period_s=0.2)
    assert not ns.status("one")["ready"]

    def endpoints() -> int:
        subsets = ns.plane.ask("GET", f"{ns.root}/endpoints/one").get("subsets") or [{}]
        return len(subsets[0].get("addresses", []))

    assert endpoints() == 0
    ns.exec("one", "touch", "/www/ready")
    ns.wait_ready("one")
    wait_for(lambda: endpoints() == 1, "it is an endpoint", period_s=0.2)
    ns.exec("one", "rm", "/www/ready")
    wait_for(lambda: endpoints() == 0, "it is none any more", period_s=0.2)
    assert ns.status("one")["restartCount"] == 0
