"""`kata-runtime inspect` of real sandboxes, beside what ip, tc, ps and the container itself say."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kit.cri import Cri, mount
from kit.kata import Kata, wait_for
from kit.pod_network import BRIDGE, GATEWAY

SLEEP = ("sleep", "100000")


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=180).stdout


def facts_of(kata: Kata, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(kata.ok("inspect", name, "--json"))
    return found


def tc_packets(netns: str, device: str) -> int:
    """The counter of the redirect at ingress, read by hand."""
    text = said("nsenter", f"--net={netns}", "tc", "-json", "-s", "filter", "show", "dev", device, "ingress")
    entries = [entry for entry in json.loads(text) if "actions" in entry.get("options", {})]
    return int(entries[0]["options"]["actions"][0]["stats"]["packets"])


@pytest.mark.qemu("what QEMU says of its machine")
def test_a_pod(cri: Cri, kata: Kata, tmp_path: Path) -> None:
    """Facts against what is seen by hand; then a QEMU that hangs; then one that dies while it is looked at."""
    volume = tmp_path / "volume"
    volume.mkdir()
    pod = cri.run_pod()
    container = pod.start(*SLEEP, mounts=[mount(volume, "/data")])
    pod.sh(container, f"ping -c 3 -W 20 {GATEWAY}")
    before = tc_packets(pod.netns, "tap0_kata")
    facts = facts_of(kata, pod.id)
    assert facts["missing"] == [one for one in facts["missing"] if one["part"] == "network.nft"]
    assert facts["state"] == "running"
    assert facts["labels"]["io.kubernetes.pod.name"] == pod.config["metadata"]["name"]

    check_names(kata, pod.id, container)
    check_processes(facts)
    check_network(facts, pod.netns, pod.addresses, before)
    check_files(facts, container, volume)
    check_guest(facts, container, pod.sh(container, "uname -r; nproc").split())
    check_picture(kata, pod.id, tmp_path / "pod.svg")

    qemu = next(one["pid"] for one in facts["processes"] if one["role"] == "vmm")
    os.kill(qemu, signal.SIGSTOP)
    started = time.monotonic()
    hung = facts_of(kata, pod.id)
    assert time.monotonic() - started < 180
    assert hung["hypervisor"] is None
    assert hung["guest"] is None
    why = {one["part"]: one["why"] for one in hung["missing"]}
    assert {"hypervisor", "guest"} <= set(why)
    assert any("stopped by a signal" in one["why"] for one in hung["missing"])
    assert hung["network"]["redirects"], "what can be seen is shown"
    assert "stopped by a signal" in kata.ok("inspect", pod.id)

    with kata.spawn("inspect", pod.id, "--json", stdout=subprocess.PIPE) as looking:
        wait_for(lambda: asks(looking.pid), "it asks the sandbox")
        os.kill(qemu, signal.SIGKILL)
        out, _ = looking.communicate(timeout=180)
    assert looking.returncode == 0
    after = json.loads(out)
    assert after["state"] == "stopped"
    assert any("it ended while it was looked at" in one["why"] for one in after["missing"])
    pod.wait_exit(container)  # containerd has seen the end


def asks(inspect: int) -> bool:
    """Whether it has a socket beside the pair of its event loop: it has looked at the processes by then."""
    sockets = [one for one in Path(f"/proc/{inspect}/fd").iterdir() if os.readlink(one).startswith("socket:")]
    return len(sockets) > 2


def check_names(kata: Kata, sandbox: str, container: str) -> None:
    for name in (sandbox[:20], container, container[:20]):
        assert facts_of(kata, name)["sandbox_id"] == sandbox


def check_processes(facts: dict[str, Any]) -> None:
    roles = {one["role"]: one for one in facts["processes"]}
    assert {"shim", "vmm", "virtiofsd"} <= set(roles)
    qemu = roles["vmm"]
    shown = said("ps", "-o", "ppid=,args=", "-p", str(qemu["pid"]))
    assert int(shown.split()[0]) == roles["shim"]["pid"] == qemu["parent"]
    assert len(qemu["threads"]) == len(os.listdir(f"/proc/{qemu['pid']}/task"))
    assert any(name.startswith(("CPU 0/", "ALL CPUs/")) for _, name in qemu["threads"])
    parts = facts["command_line"]
    assert " ".join(part["part"] for part in parts) == " ".join(qemu["command"])
    assert [part["part"] for part in parts if not part["known"]] == []
    assert facts["hypervisor"]["status"] == "running"
    devices = {one["device_id"]: one for one in facts["hypervisor"]["devices"]}
    assert devices["pci-bridge-0"]["origin"] == "command line"
    assert devices["fs-kataShared"]["origin"] == devices["virtio-net-0"]["origin"] == "hot-plug"
    assert devices["fs-kataShared"]["guest_path"] == "02/01"


def check_network(facts: dict[str, Any], netns: str, addresses: list[str], before: int) -> None:
    network = facts["network"]
    assert network["inode"] == os.stat(netns).st_ino
    assert any(one["command"].startswith("qemu") for one in network["members"])
    links = {one["name"]: one for one in network["links"]}
    by_hand = json.loads(said("nsenter", f"--net={netns}", "ip", "-json", "address", "show", "dev", "eth0"))[0]
    eth0 = links["eth0"]
    assert (eth0["index"], eth0["mac"]) == (by_hand["ifindex"], by_hand["address"])
    assert f"{addresses[0]}/24" in eth0["addresses"]
    assert any(route.startswith(f"default via {GATEWAY} ") for route in network["routes"])
    (nic,) = network["nics"]
    assert (nic["interface"], nic["tap"], nic["model"]) == ("eth0", "tap0_kata", "tcfilter")
    assert nic["peer"]["index"] == eth0["peer_index"] == by_hand["link_index"]
    assert nic["peer"]["master"] == BRIDGE
    packets = {(one["source"], one["target"]): one["packets"] for one in network["redirects"]}
    assert set(packets) == {("eth0", "tap0_kata"), ("tap0_kata", "eth0")}
    assert before <= packets["tap0_kata", "eth0"] <= tc_packets(netns, "tap0_kata")
    assert before >= 3


def check_files(facts: dict[str, Any], container: str, volume: Path) -> None:
    own = [one for one in facts["share"]["mounts"] if one["container"] == container]
    by_destination = {one["destination"]: one for one in own}
    assert by_destination["/data"]["host"] == str(volume)
    assert by_destination["/data"]["guest"].endswith("-data")
    assert {"/", "/etc/hosts", "/etc/resolv.conf", "/etc/hostname"} <= set(by_destination)
    assert by_destination["/"]["fstype"] == "overlay"


def check_guest(facts: dict[str, Any], container: str, inside: list[str]) -> None:
    guest = facts["guest"]
    assert [guest["kernel"], str(guest["cpus"])] == inside
    (mine,) = [one for one in guest["processes"] if one["container"] == container]
    assert mine["command"] == " ".join(SLEEP)
    assert any(one["target"] == "/run/kata-containers/shared/containers" for one in guest["mounts"])
    assert "virtiofs" in {one["name"] for one in guest["modules"]}
    eth0 = next(one for one in guest["links"] if one["name"] == "eth0")
    outer = next(one for one in facts["network"]["links"] if one["name"] == "eth0")
    assert eth0["mac"] == outer["mac"]
    assert outer["addresses"][0] in eth0["addresses"]
    assert any((one["destination"], one["gateway"]) == ("default", GATEWAY) for one in guest["routes"])
    assert 0 < guest["memory_available"] < guest["memory_total"] <= facts["memory_mib"] << 20
    assert guest["kernel_parameters"].split() == [one["part"] for one in facts["kernel_parameters"]]


def check_picture(kata: Kata, sandbox: str, file: Path) -> None:
    assert kata("inspect", sandbox, "--svg", str(file)).code == 0
    texts = [element.text or "" for element in ElementTree.fromstring(file.read_text()).iter()]
    assert any(text.startswith("eth0@if") for text in texts)
    assert "kataShared (virtiofs)" in texts


@pytest.mark.qemu("what QEMU says of its machine")
def test_a_container_of_run(kata: Kata) -> None:
    """With a disk and no network; then stopped: its record; and what is no sandbox."""
    name = kata.start("--net", "none", "busybox", "sh", "-c", "echo hello; exec sleep 1000")
    facts = facts_of(kata, name)
    assert facts["missing"] == []
    assert facts["network"] is None
    (disk,) = facts["hypervisor"]["disks"]
    assert disk["file"].endswith("/root.qcow2")
    assert disk["guest_mount"].endswith(f"/layers/{name}")
    text = kata.ok("inspect", name)
    assert "\x1b" not in text
    assert f"Sandbox {name}  running" in text
    kata.ok("kill", "-s", "KILL", name)
    wait_for(lambda: kata.listed(name)["state"] == "stopped", "it has stopped")
    wait_for(lambda: facts_of(kata, name)["processes"] == [], "its processes have ended too")
    facts = facts_of(kata, name)
    assert (facts["state"], facts["guest"]) == ("stopped", None)
    assert facts["containers"][0]["exit_code"] == 137
    assert "it has stopped" in kata.ok("inspect", name)
    for words, message in (
        (("no-such-sandbox",), "cannot find no-such-sandbox: no such container"),
        (("--jsn", name), "No such option"),
        ((name, "--svg", "/no/such/folder/x.svg"), "cannot write /no/such/folder/x.svg"),
    ):
        code, _, err = kata("inspect", *words)
        assert code == 1
        assert message in err
