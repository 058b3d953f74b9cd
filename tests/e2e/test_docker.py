"""The Docker of the distribution with `kata-runtime` for its runtime, by path."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.docker import BRIDGE_ADDRESS, Docker, docker_here
from kit.kata import wait_for

pytestmark = pytest.mark.skipif(shutil.which("dockerd") is None, reason="docker.io is not installed")

LOOP = "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done"
PAGE = "echo page > /tmp/index.html; exec httpd -f -p 80 -h /tmp"
GET = ("wget", "-q", "-O", "-")
FILE = """
FROM tools:1 AS first
RUN echo one > /one
FROM tools:1
COPY --from=first /one /two
USER 5:6
RUN cat /two /proc/sys/kernel/osrelease; id -u; ip -o address show eth0
CMD ["cat", "/two"]
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Docker]:
    with docker_here() as found:
        yield found


@pytest.fixture
def docker(daemon: Docker) -> Iterator[Docker]:
    yield daemon
    daemon.remove_containers()


def test_run(docker: Docker) -> None:
    words = ("run", "--rm", "-i", "--init", "--network", "none", docker.image, "sh", "-c")
    done = docker(*words, "cat; cat /proc/sys/kernel/osrelease; exit 4", input="through\n")
    assert (done.code, done.out.splitlines()[0]) == (4, "through")
    assert done.out.splitlines()[1] != os.uname().release
    missing = docker("run", "--rm", "--network", "none", docker.image, "no-such-program")
    assert (missing.code, 'exec: "no-such-program": executable file not found' in missing.err) == (127, True)
    refused = docker("run", "--rm", "--network", "host", docker.image, "true")
    assert (refused.code, "cannot use the host's network" in refused.err) == (125, True)
    assert docker.ok("ps", "-a", "-q") == ""


def test_a_container_in_the_background(docker: Docker, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("given")
    volume = ("-v", f"{tmp_path}:/mnt:ro", "--tmpfs", "/scratch")
    docker.start("--network", "none", "-t", "--name", "box", *volume, docker.image, "sh", "-c", LOOP)
    wait_for(lambda: docker.ok("logs", "box") == "ready\n", "the first line of the log")
    assert docker("exec", "box", "sh", "-c", "echo in exec; exit 9")[:2] == (9, "in exec\n")
    assert docker("exec", "box", "sh", "-c", "kill -9 $$").code == 137
    assert docker.ok("exec", "-i", "box", "cat", "-", "/mnt/given", input="some ") == "some given"
    assert "katapod-proxy" in docker.ok("top", "box")
    assert int(docker.ok("stats", "--no-stream", "--format", "{{.PIDs}}", "box")) > 1  # the VM's processes
    docker.ok("pause", "box")
    assert docker.ok("inspect", "box", "--format", "{{.State.Status}}") == "paused\n"
    docker.ok("unpause", "box")
    docker.ok("cp", f"{tmp_path}/given", "box:/tmp/given")
    assert docker.ok("exec", "box", "cat", "/tmp/given") == "given"
    docker.ok("exec", "box", "sh", "-c", "echo written > /written")
    docker.ok("cp", "box:/written", f"{tmp_path}/taken")
    assert (tmp_path / "taken").read_text() == "written\n"
    assert "A /written" in docker.ok("diff", "box").splitlines()
    docker.ok("commit", "box", "changed:1")
    docker.ok("create", "--name", "of-changed", "changed:1", "true")
    docker.ok("cp", "of-changed:/written", f"{tmp_path}/committed")
    assert (tmp_path / "committed").read_text() == "written\n"
    docker.ok("kill", "box")
    assert docker.ok("wait", "box") == "137\n"


def test_networks(docker: Docker) -> None:
    """Docker moves an interface into the network namespace between `create` and `start`."""
    published = ("-p", f"{BRIDGE_ADDRESS}:8088:80")
    web = docker.start("--name", "web", *published, docker.image, "sh", "-c", PAGE)
    address = docker.ok("inspect", "web", "--format", "{{.NetworkSettings.IPAddress}}").strip()
    of_a_port = ("curl", "-s", f"http://{BRIDGE_ADDRESS}:8088/")
    wait_for(lambda: docker.on_the_host(*of_a_port).out == "page\n", "an answer at the port", period_s=1)
    assert docker.on_the_host("curl", "-s", f"http://{address}/").out == "page\n"
    beside = docker.start("--name", "beside", "--network", "container:web", docker.image, "sleep", "1000")
    assert docker.ok("exec", "beside", *GET, "http://127.0.0.1/") == "page\n"
    assert docker.sandbox(beside) == docker.sandbox(web)
    assert docker.ok("run", "--rm", docker.image, *GET, f"http://{address}/") == "page\n"


def test_names_in_a_network_of_its_own(docker: Docker) -> None:
    """By UDP and, where a container is told to, by TCP. The port stays free: a container may serve names itself."""
    docker.ok("network", "create", "own")
    server = f"nc -u -l -p 53 & nc -l -p 53 & {PAGE}"
    docker.start("--name", "web", "--network", "own", "--network-alias", "shop", docker.image, "sh", "-c", server)
    words = ("run", "--rm", "--network", "own")
    wait_for(lambda: docker(*words, docker.image, *GET, "http://web/").out == "page\n", "an answer by name", period_s=1)
    assert docker.ok(*words, "--dns-option", "use-vc", docker.image, *GET, "http://shop/") == "page\n"
    unknown = docker(*words, docker.image, *GET, "http://nobody.invalid/")
    assert "bad address" in unknown.err
    assert docker.ok("exec", "web", *GET, "http://web/") == "page\n"
    docker.ok("rm", "-f", "web")
    docker.ok("network", "rm", "own")


def test_build(docker: Docker) -> None:
    out = docker.ok("build", "--no-cache", "-t", "built:1", "-", input=FILE)
    assert "\none\n" in out
    assert "\n5\n" in out
    assert f"inet {BRIDGE_ADDRESS.rpartition('.')[0]}." in out
    assert os.uname().release not in out


def test_buildkit(docker: Docker) -> None:
    """It runs what dockerd finds as `runc`, a whole `run` for each step."""
    words = ("build", "--no-cache", "--progress", "plain", "-t", "kit:1", "-")
    done = docker(*words, input=FILE, buildkit=True)
    assert done.code == 0, done
    said = [line.split(" ", 2)[-1] for line in done.err.splitlines()]
    assert {"one", "5"} <= set(said)
    assert f"inet {BRIDGE_ADDRESS.rpartition('.')[0]}." in done.err
    assert os.uname().release not in done.err
    assert docker.ok("run", "--rm", "--network", "none", "kit:1") == "one\n"
    failing = docker(*words, input=f"FROM {docker.image}\nRUN exit 7\n", buildkit=True)
    assert (failing.code != 0, "exit code: 7" in failing.err) == (True, True), failing


def test_a_restart_policy_and_a_daemon_that_was_killed(docker: Docker) -> None:
    """Containers go on without the daemon, and it finds them again (live-restore)."""
    fails_once = f"test -e /again || {{ : > /again; exit 8; }}; {LOOP}"
    docker.start(
        "--network", "none", "--restart", "on-failure:3", "--name", "box", docker.image, "sh", "-c", fails_once
    )
    wait_for(lambda: docker.ok("logs", "box") == "ready\n", "the first line of the log")
    assert docker.ok("inspect", "box", "--format", "{{.RestartCount}}") == "1\n"
    docker.kill()
    docker.open()
    assert docker("exec", "box", "sh", "-c", "echo in exec; exit 9")[:2] == (9, "in exec\n")
    docker.ok("stop", "-t", "200", "box")
    assert docker.ok("inspect", "box", "--format", "{{.State.ExitCode}}") == "3\n"
