"""`kata-node` on a node with a real containerd: every stage, its failures, and what is left: nothing."""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from kit.accel import ACCELERATOR
from kit.cluster_node import PAYLOAD, ClusterNode, cluster_node_running, needs_payload
from kit.kata import wait_for
from kit.oci_archive import BUSYBOX

pytestmark = [needs_payload, pytest.mark.timeout(2400)]

IMAGE_ARCHIVE = PAYLOAD.parent / "katapod-node.oci.tar"
CONFIG = "/etc/containerd/config.toml"
INSTALL = ("install", "--source", str(PAYLOAD), "--target", "one")


@pytest.fixture(scope="module")
def cluster_node() -> Iterator[ClusterNode]:
    with cluster_node_running() as found:
        yield found


def ctr(node: ClusterNode, *args: str) -> str:
    return node.ok("ctr", "--namespace", "k8s.io", *args, limit_s=1200)


def test_installed_used_and_removed(cluster_node: ClusterNode) -> None:
    before = cluster_node.files()
    ctr(cluster_node, "run", "--detach", "--runtime", "io.containerd.runc.v2", BUSYBOX, "bystander", "sleep", "9999")
    bystander = ctr(cluster_node, "tasks", "list").splitlines()[1].split()[1]

    done = cluster_node.kata_node(*INSTALL)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    assert report["kernel"] not in ("", os.uname().release)
    assert report["accelerator"] in ("kvm", "uml", "tcg")
    assert report["engine"].startswith("containerd ")
    assert ctr(cluster_node, "tasks", "list").splitlines()[1].split()[1] == bystander, "a container has not lived on"

    again = cluster_node.files()
    assert cluster_node.kata_node(*INSTALL).returncode == 0
    changed = {path for path, content in cluster_node.files().items() if again.get(path) != content}
    assert not [path for path in changed if not path.startswith(("/var/", "/run/"))], "a second time changes files"

    shim = "/opt/katapod/one/bin/containerd-shim-kata-v2"
    ctr(cluster_node, "run", "--detach", "--runtime", shim, BUSYBOX, "guest", "sleep", "9999")
    assert ctr(cluster_node, "tasks", "exec", "--exec-id", "e", "guest", "uname", "-r").strip() == report["kernel"]
    refused = cluster_node.kata_node("uninstall")
    assert refused.returncode == 1
    assert "stage sandboxes: sandboxes run on this node still" in refused.stderr
    ctr(cluster_node, "tasks", "delete", "--force", "guest")
    ctr(cluster_node, "containers", "delete", "guest")

    gone = cluster_node.kata_node("uninstall")
    assert gone.returncode == 0, gone.stderr
    assert cluster_node.files() == before
    assert ctr(cluster_node, "tasks", "list").splitlines()[1].split()[1] == bystander
    ctr(cluster_node, "tasks", "delete", "--force", "bystander")
    ctr(cluster_node, "containers", "delete", "bystander")
    assert cluster_node.kata_node("uninstall").returncode == 0, "it cannot be repeated"


def test_handlers_come_and_go_with_their_configurations(cluster_node: ClusterNode) -> None:
    before = cluster_node.files()
    text = "[runtime]\nenable_debug = true\n"
    handlers = [{"name": "kata"}, {"name": "kata-more", "dropIns": [text], "measure": True}]
    done = cluster_node.kata_node(*INSTALL, "--settings", json.dumps({"handlers": handlers}))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["handlers"] == ["kata", "kata-more"]
    assert report["measured"]["kata-more"]["memoryMib"] > 0
    config = "/opt/katapod/handlers/kata-more/configuration.toml"
    assert f'ConfigPath = "{config}"' in cluster_node.ok("cat", CONFIG)
    shown = cluster_node.ok("/opt/katapod/one/bin/kata-runtime", "--config", config, "config", "show")
    assert "enable_debug = true" in shown

    wrong = [{"name": "kata", "dropIns": ["[runtime]\nno_such_key = 1\n"]}]
    refused = cluster_node.kata_node(*INSTALL, "--settings", json.dumps({"handlers": wrong}))
    assert refused.returncode == 1
    assert "[runtime] no_such_key: unknown key" in refused.stderr
    assert f'ConfigPath = "{config}"' in cluster_node.ok("cat", CONFIG), "what there was has gone"

    assert cluster_node.kata_node(*INSTALL).returncode == 0
    assert "kata-more" not in cluster_node.ok("cat", CONFIG)
    assert cluster_node.run("test", "-e", "/opt/katapod/handlers").returncode == 1
    assert cluster_node.kata_node("uninstall").returncode == 0
    assert cluster_node.files() == before


def test_what_is_not_allowed_is_undone(cluster_node: ClusterNode) -> None:
    before = cluster_node.files()
    done = cluster_node.kata_node(*INSTALL, "--accelerators", "kvm" if ACCELERATOR.value != "kvm" else "tcg")
    assert done.returncode == 1
    assert "stage image: VMs run by" in done.stderr
    assert cluster_node.files() == before


def test_an_engine_that_does_not_come_back_gets_its_file_again(cluster_node: ClusterNode) -> None:
    before = cluster_node.files()
    cluster_node.ok("touch", "/run/refuse")
    done = cluster_node.kata_node(*INSTALL)
    cluster_node.ok("rm", "/run/refuse")
    assert done.returncode == 1
    assert "stage engine: containerd serves again: not within" in done.stderr
    assert cluster_node.engine_serves()
    assert cluster_node.files() == before


def test_a_handler_of_somebody_else_is_left_alone(cluster_node: ClusterNode) -> None:
    before = cluster_node.files()
    table = '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata]\nruntime_type = "io.containerd.runc.v2"\n'
    cluster_node.ok("sh", "-c", f"cp {CONFIG} /run/config && printf '%s' '{table}' >> {CONFIG}")
    done = cluster_node.kata_node(*INSTALL)
    assert done.returncode == 1
    assert "stage host: the runtime handler kata is configured already" in done.stderr
    cluster_node.ok("sh", "-c", f"cat /run/config > {CONFIG}")
    assert cluster_node.files() == before


@pytest.mark.skipif(not IMAGE_ARCHIVE.exists(), reason="no image of the operator here: make node-image")
def test_from_the_image_as_a_job_does_it(cluster_node: ClusterNode) -> None:
    before = cluster_node.files()
    ctr(cluster_node, "images", "import", str(IMAGE_ARCHIVE))
    report = run_job(cluster_node, "install", "--target", "two")
    assert report["ok"], report
    assert report["kernel"] not in ("", os.uname().release)
    shim = "/opt/katapod/two/bin/containerd-shim-kata-v2"
    told = ctr(cluster_node, "run", "--rm", "--runtime", shim, BUSYBOX, "guest", "uname", "-r")
    assert told.strip() == report["kernel"]
    assert run_job(cluster_node, "uninstall")["ok"]
    assert cluster_node.files() == before


def run_job(node: ClusterNode, *args: str) -> dict[str, Any]:
    """As the kubelet runs a job's container; returns its report. It lives on while it has containerd started again."""
    image = next(one for one in ctr(node, "images", "list", "-q").split() if one.startswith("katapod.io/node:"))
    options = ["--detach", "--privileged", "--net-host", "--with-ns", "pid:/proc/1/ns/pid"]
    options += ["--mount", "type=bind,src=/,dst=/host,options=rbind:rw"]
    program = ["kata-node", *args, "--root", "/host", "--report", "/host/run/report"]
    ctr(node, "run", *options, image, "job", *program)

    def ended() -> bool:
        listed = node.run("ctr", "--namespace", "k8s.io", "tasks", "list")  # nobody answers while it starts
        return listed.returncode == 0 and any(
            line.split()[::2] == ["job", "STOPPED"] for line in listed.stdout.splitlines()
        )

    wait_for(ended, "the job ends", 1200, 0.5)
    node.run("ctr", "--namespace", "k8s.io", "tasks", "delete", "job")  # its status is that of the job
    ctr(node, "containers", "delete", "job")
    report: dict[str, Any] = json.loads(node.ok("cat", "/run/report"))
    return report
