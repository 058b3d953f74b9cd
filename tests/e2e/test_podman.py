"""The Podman of the distribution with `kata-runtime` for its runtime."""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.kata import wait_for
from kit.leaks import claim
from kit.podman import Podman, podman_here

pytestmark = pytest.mark.skipif(shutil.which("podman") is None, reason="podman is not installed")

STATES = Path("/run/kata-runtime")
LOOP = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done"

POD = """
apiVersion: v1
kind: Pod
metadata: {name: played}
spec:
  containers:
  - name: server
    image: localhost/tools:1
    command: [/bin/sh, -c, "echo page > /bin/page; exec /bin/httpd -f -p 80 -h /bin"]
  - name: client
    image: localhost/tools:1
    command: [/bin/sleep, "1000"]
"""


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    with podman_here() as found:
        yield found


@pytest.mark.core
def test_run(podman: Podman) -> None:
    done = podman("run", "--rm", "-i", "--network", "none", podman.image, "sh", "-c", "cat; exit 4", input="through\n")
    assert (done.code, done.out) == (4, "through\n")
    assert podman("run", "--rm", "--network", "none", podman.image, "no-such-program").code == 127
    assert podman("run", "--rm", "--network", "none", podman.image, "/tmp").code == 126
    assert podman.ok("ps", "-a", "-q") == ""


def test_a_container_in_the_background(podman: Podman) -> None:
    health = ("--health-cmd", "echo > /tmp/checked", "--health-interval", "disable")  # a timer would be systemd's
    box = podman.start("--network", "none", "--name", "box", *health, podman.image, "sh", "-c", LOOP)
    wait_for(lambda: podman.ok("logs", "box") == "ready\n", "the first line of the log")
    assert podman("exec", "box", "sh", "-c", "echo in exec; exit 9")[:2] == (9, "in exec\n")
    assert podman.ok("exec", "-i", "box", "cat", input="some") == "some"
    podman.ok("healthcheck", "run", "box")
    podman.ok("exec", "box", "cat", "/tmp/checked")
    assert "--runtime" in podman.ok("generate", "systemd", "--new", "box")
    assert "katapod-proxy" in podman.ok("top", "box")
    podman.ok("pause", "box")
    assert podman.ok("inspect", "box", "--format", "{{.State.Status}}") == "paused\n"
    podman.ok("unpause", "box")
    stats = json.loads(podman.ok("stats", "--no-stream", "--format", "json", "box"))
    assert stats[0]["pids"] > "1"  # the VM's processes are counted, not the proxy alone
    assert not Path(f"/var/lib/katapod/sandboxes/{box}/container.log").exists()
    podman.ok("stop", "-t", "60", "box")
    assert podman.ok("inspect", "box", "--format", "{{.State.ExitCode}}") == "3\n"
    podman.ok("start", "box")
    podman.ok("kill", "box")
    assert podman.ok("wait", "box") == "137\n"
    podman.ok("rm", "box")


def test_files(podman: Podman, tmp_path: Path) -> None:
    (tmp_path / "volume").write_text("of the volume")
    volume = ("-v", f"{tmp_path}/volume:/mnt/volume:ro")
    podman.start("--network", "none", "--name", "files", *volume, podman.image, "sh", "-c", LOOP)
    (tmp_path / "given").write_text("given")
    podman.ok("cp", f"{tmp_path}/given", f"files:/tmp/{tmp_path.name}-given")
    assert podman.ok("exec", "files", "cat", f"/tmp/{tmp_path.name}-given") == "given"
    assert not Path(f"/tmp/{tmp_path.name}-given").exists()  # the host's
    podman.ok("cp", "files:/mnt/volume", f"{tmp_path}/taken")
    assert (tmp_path / "taken").read_text() == "of the volume"
    podman.ok("exec", "files", "sh", "-c", "echo written > /written")
    assert "A /written" in podman.ok("diff", "files")
    podman.ok("commit", "-q", "files", "localhost/changed:1")
    assert podman.ok("run", "--rm", "--network", "none", "localhost/changed:1", "cat", "/written") == "written\n"
    podman.ok("rm", "-f", "-t", "0", "files")


def test_one_vm_for_those_who_share_a_network(podman: Podman) -> None:
    """By bridge, with a published port; and a pod."""
    page = "echo page > /tmp/index.html; exec httpd -f -p 80 -h /tmp"
    box = podman.start("--name", "server", podman.image, "sh", "-c", page)
    get = ("wget", "-q", "-O", "-", "http://127.0.0.1/index.html")
    inside = ("run", "--rm", "--network", "container:server", podman.image, *get)
    wait_for(lambda: podman(*inside).out == "page\n", "an answer in the same VM", limit_s=180, period_s=1)
    podman.ok("pod", "create", "--infra-image", podman.image, "--infra-command", "/bin/sleep 1000", "--name", "group")
    member = podman.start("--pod", "group", "--name", "member", podman.image, "sh", "-c", page)
    inside = ("run", "--rm", "--pod", "group", podman.image, *get)
    wait_for(lambda: podman(*inside).out == "page\n", "an answer in the pod", limit_s=180, period_s=1)
    infra = json.loads((STATES / member / "state.json").read_text())["sandbox"]
    claim(infra)
    assert infra != member
    assert (STATES / infra / "state.json").exists()
    podman.ok("pod", "rm", "-f", "-t", "0", "group")
    podman.ok("rm", "-f", "-t", "0", "server")
    assert not {box, member, infra, f".{box}", f".{infra}"} & set(os.listdir(STATES))


def test_the_hosts_network_is_refused(podman: Podman) -> None:
    done = podman("run", "--rm", "--network", "host", podman.image, "true")
    assert done.code != 0
    assert "cannot use the host's network" in done.err
    assert podman.ok("ps", "-a", "-q") == ""


def test_what_cannot_reach_a_guest_is_refused(podman: Podman, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{tmp_path}/notify")
        done = podman(
            *("run", "--rm", "--network", "none", "--sdnotify", "container", podman.image, "true"),
            environment={"NOTIFY_SOCKET": f"{tmp_path}/notify"},
        )
    assert done.code != 0
    assert "cannot pass the socket /run/notify/notify.sock (NOTIFY_SOCKET)" in done.err
    assert podman.ok("ps", "-a", "-q") == ""


def test_play_kube(podman: Podman, tmp_path: Path) -> None:
    """Both containers in one VM; the text that Podman generates of them names them again."""
    (tmp_path / "pod.yaml").write_text(POD)
    podman.ok("play", "kube", "--network", "none", f"{tmp_path}/pod.yaml")
    ids = podman.ok("ps", "--no-trunc", "--format", "{{.ID}}").split()
    for each in ids:
        claim(each)
    get = ("exec", "played-client", "/bin/wget", "-q", "-O", "-", "http://127.0.0.1/page")
    wait_for(lambda: podman(*get).out == "page\n", "an answer of the other container", period_s=1)
    states = [json.loads((STATES / each / "state.json").read_text()) for each in ids]
    assert (len(ids), len({state["sandbox"] for state in states})) == (3, 1)
    text = podman.ok("generate", "kube", "played")
    assert {"name: played-client", "name: played-server"} <= {line.strip() for line in text.splitlines()}
    podman.ok("play", "kube", "--down", f"{tmp_path}/pod.yaml")
    assert podman.ok("ps", "-a", "-q") == ""
