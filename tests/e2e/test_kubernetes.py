"""What users of kubectl do with pods in VMs, on a real kubelet."""

import contextlib
import re
from pathlib import Path

import pytest

from kit.cri_stream import connect_inside
from kit.kata import wait_for
from kit.kubernetes import NODE, Namespace, container, deployment, needs_kubelet, pod

pytestmark = [needs_kubelet, pytest.mark.timeout(1800)]

SLEEP = ("sleep", "infinity")
SERVE = "mkdir -p /www && hostname > /www/index.html && exec httpd -f -p {port} -h /www"


def test_a_deployment_becomes_available(ns: Namespace) -> None:
    ns.apply(deployment("app", 1, *SLEEP))
    ns.wait("condition=Available", "deployment/app")
    (found,) = ns.pods(app="app")
    name, address = found["metadata"]["name"], found["status"]["podIP"]
    kernel = ns.exec(name, "uname", "-r").strip()
    assert kernel != Path("/proc/sys/kernel/osrelease").read_text().strip()
    assert ns.exec(name, "hostname").strip() == name
    assert f"inet {address}/" in ns.exec(name, "ip", "address", "show", "dev", "eth0")
    processes = ns.exec(name, "ps", "-o", "args").splitlines()[1:]
    assert sorted(processes) == ["ps -o args", "sleep infinity"]
    assert found["spec"]["nodeName"] == NODE
    assert found["spec"]["overhead"], "the RuntimeClass counts"


def test_exec_with_a_terminal(ns: Namespace) -> None:
    ns.start("one", *SLEEP)
    with ns.terminal("exec", "-it", "one", "--", "sh") as terminal:
        screen = terminal.screen
        screen.expect("# ")
        # the size comes by a channel of its own
        screen.sendline("until test \"$(stty size)\" = '24 80'; do sleep 0.1; done; tty")
        screen.expect("/dev/pts/0\r\n")
        terminal.resize(40, 132)
        screen.sendline("until test \"$(stty size)\" = '40 132'; do sleep 0.1; done; echo re''sized")
        screen.expect("resized\r\n")
        screen.sendline("sh -c 'echo sle\"\"eping; exec sleep 1000'")
        screen.expect("sleeping\r\n")  # said in the foreground: a shell that has yet to start it would keep the signal
        screen.send("\x03")
        screen.expect("# ")
        screen.sendline("exit 7")
        assert terminal.wait() == 7


def test_exec_streams_and_status(ns: Namespace) -> None:
    ns.start("one", *SLEEP)
    done = ns.plane.kubectl(
        *("--namespace", ns.name, "exec", "-i", "one", "--", "sh", "-c", "cat; echo error >&2; exit 3"),
        text="through\n",
        check=False,
    )
    assert done.stdout == "through\n"
    assert done.stderr.startswith("error\n")
    assert done.returncode == 3
    size = 4 << 20
    assert len(ns.exec("one", "sh", "-c", f"head -c {size} /dev/zero | tr '\\0' x")) == size


def test_logs_are_followed(ns: Namespace) -> None:
    wait = "until test -e /tmp/{}; do sleep 0.1; done"
    script = f"echo first; {wait.format('go')}; echo second >&2; {wait.format('end')}"
    ns.start("one", "sh", "-c", script, restartPolicy="Never")
    with ns.spawn("logs", "-f", "one") as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "first\n"
        ns.exec("one", "touch", "/tmp/go")
        assert follower.stdout.readline() == "second\n"
        ns.exec("one", "touch", "/tmp/end")
        assert follower.stdout.read() == ""
        assert follower.wait(180) == 0
    ns.wait_phase("one", "Succeeded")
    assert ns.logs("one") == "first\nsecond\n"
    assert ns.logs("one", "--tail=1") == "second\n"
    assert re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z first\n", ns.logs("one", "--timestamps"))


def test_attach(ns: Namespace) -> None:
    script = 'while read line; do echo "got $line"; done; echo over'
    ns.start("one", "sh", "-c", script, main={"stdin": True, "stdinOnce": True}, restartPolicy="Never")
    with ns.spawn("attach", "-i", "one") as attached:
        assert attached.stdin is not None
        assert attached.stdout is not None
        attached.stdin.write("hello\n")
        attached.stdin.flush()
        assert attached.stdout.readline() == "got hello\n"
        attached.stdin.close()
        assert attached.stdout.readline() == "over\n"
    ns.wait_phase("one", "Succeeded")


def test_cp(ns: Namespace, tmp_path: Path) -> None:
    ns.start("one", *SLEEP)
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep/file").write_bytes(bytes(range(256)) * 4096)
    (tree / "run").write_text("#!/bin/sh\necho ran\n")
    (tree / "run").chmod(0o755)
    ns.kubectl("cp", str(tree), f"{ns.name}/one:/tmp/in")
    assert ns.exec("one", "/tmp/in/run") == "ran\n"
    ns.kubectl("cp", f"{ns.name}/one:/tmp/in", str(tmp_path / "out"))
    assert (tmp_path / "out/deep/file").read_bytes() == (tree / "deep/file").read_bytes()


def test_port_forward(ns: Namespace) -> None:
    """To a server that listens on the pod's loopback only."""
    script = "mkdir /www && echo inside > /www/index.html && exec httpd -f -p 127.0.0.1:8080 -h /www"
    ns.start("one", "sh", "-c", script)
    ns.wait_says("one", "wget -q -O - http://127.0.0.1:8080/", "inside")
    with ns.spawn("port-forward", "pod/one", ":8080") as forwarder:
        assert forwarder.stdout is not None
        told = re.match(r"Forwarding from 127\.0\.0\.1:(\d+) -> 8080\n", forwarder.stdout.readline())
        assert told
        for _ in range(3):
            assert get(ns, "127.0.0.1", int(told[1])).endswith("inside\n")


def get(ns: Namespace, address: str, port: int, path: str = "/") -> str:
    """The answer to a request from the node."""
    assert ns.plane.placement is not None
    with connect_inside(ns.plane.placement.netns, address, port) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        return connection.makefile("rb").read().decode()


def test_a_service_over_two_replicas(ns: Namespace) -> None:
    """By its address, which kube-proxy turns into a pod's: from the node, from a pod, and from a pod behind it."""
    probe = {"tcpSocket": {"port": 8080}, "periodSeconds": 1, "timeoutSeconds": 60}
    ns.apply(
        deployment("web", 2, "sh", "-c", SERVE.format(port=8080), main={"readinessProbe": probe}),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
        },
        pod("client", *SLEEP),
    )
    ns.wait("condition=Available", "deployment/web")
    ns.wait_ready("client")
    names = {one["metadata"]["name"] for one in ns.pods(app="web")}
    assert len(names) == 2
    address = ns.plane.ask("GET", f"{ns.root}/services/web")["spec"]["clusterIP"]

    def endpoints() -> int:
        subsets = ns.plane.ask("GET", f"{ns.root}/endpoints/web").get("subsets") or [{}]
        return len(subsets[0].get("addresses", []))

    wait_for(lambda: endpoints() == 2, "both are endpoints")
    seen: set[str] = set()

    def both_answer() -> bool:
        with contextlib.suppress(OSError):  # kube-proxy has not heard of them yet
            seen.add(get(ns, address, 80).splitlines()[-1])
        return seen == names

    wait_for(both_answer, "both have answered")
    for inside in ("client", min(names)):
        fetched = ns.sh(inside, f"for n in 1 2 3 4 5 6; do wget -q -O - http://{address}/ || exit; done").split()
        assert len(fetched) == 6
        assert set(fetched) <= names


def test_events_say_why_a_pod_does_not_start(ns: Namespace) -> None:
    """A class that no handler serves, the host's network, an image that is not there."""
    ns.cluster.apply(
        {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "none"}, "handler": "none"}
    )
    ns.apply(
        pod("no-handler", *SLEEP, runtimeClassName="none"),
        pod("on-host-network", *SLEEP, hostNetwork=True),
        pod("no-image", *SLEEP, main={"image": "docker.io/katapod-tests/none:1"}),
    )

    def told(name: str, words: str) -> None:
        def found() -> bool:
            events = ns.plane.items(f"{ns.root}/events?fieldSelector=involvedObject.name%3D{name}")
            return any(words in one["message"] for one in events)

        wait_for(found, f"an event of {name} has {words!r}", period_s=0.5)

    told("no-handler", 'no runtime for "none" is configured')
    told("on-host-network", "cannot use the host's network")
    told("no-image", "is not present with pull policy of Never")
    ns.kubectl("delete", "runtimeclass", "none")


def test_side_cars_share_the_vm(ns: Namespace) -> None:
    """Loopback, and the process table where it is asked for."""
    ns.start(
        "one",
        *SLEEP,
        beside=[container("server", "sh", "-c", SERVE.format(port="127.0.0.1:8080"))],
        shareProcessNamespace=True,
    )
    ns.wait_says("one", "wget -q -O - http://127.0.0.1:8080/", "one")
    assert "httpd -f -p 127.0.0.1:8080" in ns.exec("one", "ps", "-o", "args")
    before = ns.status("one", 1)["restartCount"]
    ns.sh("one", "kill $(pidof httpd)", container="server")
    wait_for(lambda: ns.status("one", 1)["restartCount"] == before + 1, "the server is started again", period_s=0.5)
    assert ns.status("one", 0)["restartCount"] == 0


def test_delete_and_make_again(ns: Namespace) -> None:
    kernels = set()
    for _ in range(2):
        ns.start("one", *SLEEP)
        kernels.add(ns.exec("one", "cat", "/proc/sys/kernel/random/boot_id"))
        ns.kubectl("delete", "pod", "one", limit_s=600)
        assert not ns.exists("pods/one")
        wait_for(lambda: not ns.cluster.sandboxes(), "its VM goes", period_s=0.2)
    assert len(kernels) == 2
