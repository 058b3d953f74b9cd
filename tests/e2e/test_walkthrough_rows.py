"""The walkthrough, from its file list to its last look at tc, on one real pod: the shape of what each command says.

A test for each row; rows W5 and W25, which need packages, begin in tests/integration/test_packages.py. Which command a
row has is in kit/tour_steps.py; docs/walkthrough.md shows what they say.
"""

import configparser
import json
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit import walkthrough
from kit.cri_stream import open_stream
from kit.kata import Kata, wait_for
from kit.pod_network import BRIDGE, GATEWAY
from kit.terminal import open_terminal
from kit.tour import HOSTNAME, Tour, touring
from kit.walkthrough import shape

pytestmark = pytest.mark.qemu("the walkthrough shows QEMU's machine")

CACHE = Path("/var/cache/kata-containers")


@pytest.fixture(scope="module")
def tour(guest_image: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tour]:
    with touring(tmp_path_factory.mktemp("tour")) as found:
        yield found


@pytest.fixture(scope="module")
def systemd_tour(tour: Tour, module_kata: Kata) -> Iterator[Tour]:
    """`tour` with the pod whose guest has systemd."""
    built = module_kata("image", "build", "--flavour", "systemd", timeout=240)
    assert built.code == 0, built
    with tour.systemd():
        yield tour


def assignments(text: str) -> list[str]:
    """Lines of a unit that set something, and its section marks."""
    return [line for line in text.splitlines() if line.strip() and not line.startswith(("#", ";"))]


def addresses(text: str, device: str) -> tuple[set[str], str]:
    """Addresses and MAC of a device in the output of `ip address`."""
    part = re.split(r"^\d+: ", text, flags=re.MULTILINE)
    (own,) = (one for one in part if re.match(rf"{device}(@\w+)?:", one))
    mac = re.search(r"link/ether (\S+)", own)
    assert mac is not None
    return set(re.findall(r"inet6? (\S+)", own)), mac[1]


def paths_of(tree: dict[str, Any], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], type]:
    """Every key with those above it, in order, and its type."""
    found: dict[tuple[str, ...], type] = {}
    for key, value in tree.items():
        found[(*above, key)] = type(value)
        if isinstance(value, dict):
            found |= paths_of(value, (*above, key))
    return found


def processes_of(text: str) -> dict[int, tuple[int, str]]:
    """By process id: the parent's, and the command, of `ps -o pid,ppid,args`; without those of the kernel."""
    found = {}
    for line in text.splitlines()[1:]:
        pid, parent, command = line.split(None, 2)
        if int(pid) != 2 and int(parent) != 2:
            found[int(pid)] = (int(parent), command)
    return found


def test_w06_image_links(tour: Tour) -> None:
    said = tour("W6 image")
    for line in ("^/var/cache/kata-containers:$", "^/var/cache/kata-containers/osbuilder-images:$", r"\.initrd$"):
        assert re.search(line, said, re.MULTILINE), line
    links = dict(re.findall(r"(\S+) -> (\S+)", said))
    assert {"kata-containers-initrd.img", "vmlinuz.container"} <= set(links)
    kernel, initrd = ((CACHE / name).resolve() for name in ("vmlinuz.container", "kata-containers-initrd.img"))
    assert kernel.parent == initrd.parent
    assert kernel.parent.parent == CACHE / "osbuilder-images"
    assert initrd.stat().st_size <= walkthrough.INITRD_BYTES


def test_w07_crio_and_containerd(tour: Tour) -> None:
    assert tomllib.loads(tour("W7 crio"))["crio"]["runtime"]["runtimes"]["kata"] == {
        "runtime_path": "/usr/bin/containerd-shim-kata-v2",
        "runtime_type": "vm",
        "runtime_root": "/run/vc",
        "privileged_without_host_devices": True,
    }
    plugins = tomllib.loads(tour("W7 containerd"))["plugins"]
    twin = plugins["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"]["kata"]
    assert twin["runtime_type"] == "io.containerd.kata.v2"
    assert twin["privileged_without_host_devices"] is True


def test_w08_image_unit_and_recipe(tour: Tour) -> None:
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(tour("W8 unit"))
    script = "/usr/libexec/kata-containers/osbuilder/kata-osbuilder.sh"
    assert unit["Unit"]["Description"] == "Generate Kata appliance image for host kernel"
    shown = {key: unit["Service"][key] for key in ("Type", "ExecStart", "ExecReload")}
    assert shown == {"Type": "oneshot", "ExecStart": f"{script} -c", "ExecReload": script}
    assert unit["Install"]["WantedBy"] == "kubelet.service"
    recipe = tomllib.loads(re.sub(r"^#(?=\S)", "", tour("W8 recipe"), flags=re.MULTILINE))
    assert {"packages", "files", "kernel_modules", "hook"} <= set(recipe)


def test_w09_pod_in_a_vm(tour: Tour) -> None:
    rows = [line.split() for line in tour("W9 containers").splitlines()[1:]]
    assert {(row[0], row[-1]) for row in rows} >= {
        (name, "io.containerd.kata.v2") for name in (tour.sandbox, tour.container)
    }
    states = {row.split()[0]: row.split()[-1] for row in tour("W9 tasks").splitlines()[1:]}
    assert (states[tour.sandbox], states[tour.container]) == ("RUNNING", "RUNNING")


def test_w10_qemu(tour: Tour) -> None:
    """Each device of the walkthrough, on the command line or plugged in; docs/walkthrough-qemu.md has the reasons."""
    said = f"{' '.join(tour('W10 qemu').split())} "
    vm_dir = f"/run/vc/vm/{tour.sandbox}"
    for option in (
        rf"-name sandbox-{tour.sandbox}[, ]",
        r"-uuid [0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12} ",
        r"-machine q35,",
        r"-cpu \w+",
        r"-m \d+M,slots=10,maxmem=\d+M ",
        r"-device pci-bridge,bus=pcie\.0,id=pci-bridge-0,chassis_nr=1,shpc=\w+,addr=2",
        r"-device virtio-serial-pci,\S*id=serial0 ",
        r"-device \S+,chardev=charconsole0,id=console0 ",
        r"-chardev socket,id=charconsole0,",
        r"-object rng-random,id=rng0,filename=/dev/urandom ",
        r"-device virtio-rng-pci,rng=rng0 ",
        r"-rtc base=utc,driftfix=slew,clock=host ",
        r"-vga none -no-user-config -nodefaults -nographic --?no-reboot ",
        r"-object memory-backend-\w+,id=dimm1,size=\d+M,\S*share=on ",
        r"-numa node,memdev=dimm1 ",
        rf"-pidfile {vm_dir}/pid ",
        r"-smp 1,cores=1,threads=1,sockets=\d+,maxcpus=\d+ ",
    ):
        assert re.search(option, said), f"{option} in {said}"
    for name in ("qmp.sock", "vhost-fs.sock"):
        assert Path(vm_dir, name).is_socket()
    facts = json.loads(tour.run("kata-runtime inspect --json $SANDBOX"))
    plugged = {one["device_id"]: one for one in facts["hypervisor"]["devices"]}
    assert {"fs-kataShared", "virtio-net-0", "pci-bridge-0", "serial0"} <= set(plugged)


def test_w11_config_paths(tour: Tour) -> None:
    assert tour("W11 paths") == (
        "/etc/kata-containers/configuration.toml\n/usr/share/kata-containers/defaults/configuration.toml\n"
    )


def test_w12_configuration(tour: Tour) -> None:
    """Every key that the shipped file shows is in effect, with its origin; what the author's sed set is set."""
    said = tour("W12 config")
    shown = tomllib.loads(said)
    text = Path(tour.root, "usr/share/kata-containers/defaults/configuration.toml").read_text()
    defaults = tomllib.loads(re.sub(r"^# ?(?=\w+ = )", "", text, flags=re.MULTILINE))
    assert {"hypervisor", "agent", "runtime", "factory"} <= set(defaults)
    assert [path for path in paths_of(defaults) if path not in paths_of(shown)] == []
    assert re.search(r"^debug_console_enabled = true +# /etc/kata-containers/configuration\.toml$", said, re.MULTILINE)


def test_w13_env(tour: Tour) -> None:
    """All keys of the walkthrough, with their types and in its order; Katapod has more."""
    theirs = paths_of(tomllib.loads(walkthrough.ENV))
    ours = paths_of(tomllib.loads(tour("W13 env")))
    assert [path for path in ours if path in theirs] == list(theirs)
    assert {path: ours[path] for path in theirs} == theirs
    assert paths_of(json.loads(tour.run("kata-runtime env --json"))) == ours


def test_w14_builder_script(tour: Tour) -> None:
    said = tour("W14 build")
    assert "is up to date" in said
    assert str((CACHE / "kata-containers-initrd.img").resolve()) in said


def test_w15_debug_console(tour: Tour) -> None:
    """A shell with a real terminal; tests/e2e/test_debug_console.py has the rest."""
    assert tour("W15 enabled") == "debug_console_enabled = true\n"
    with open_terminal(tour.command("kata-runtime exec $SANDBOX"), 33, 101) as terminal:
        terminal.screen.expect_exact("# ")
        terminal.screen.send("hostname; tty; stty size; exit 7\r")
        terminal.screen.expect(rf"\n{HOSTNAME}\r\n/dev/pts/\d+\r\n33 101\r\n")
        assert terminal.wait() == 7


def test_w16_tools_in_the_vm(tour: Tour) -> None:
    """`ls` and `ip`, which the author had to do without, say what his detours say."""
    assert tour("W15 shell").split() == tour("W16 ls").split()
    (address, *_) = tour.pod.addresses
    inside, _ = addresses(tour("W16 ip"), "eth0")
    assert f"{address}/24" in inside
    tables = re.findall(r"^(\w+):$", tour("W16 fib"), re.MULTILINE)
    assert tables == ["Main", "Local"]
    assert len(re.findall(rf"\|-- {re.escape(address)}\n +/32 host LOCAL", tour("W16 fib"))) == 2
    tour.run("kata-runtime exec $SANDBOX sh -c 'type ls ip ps mount dmesg ss'")


def test_w17_kernel_modules_mounts(tour: Tour) -> None:
    release = (CACHE / "vmlinuz.container").resolve().parent.name
    assert tour("W17 uname").split()[:3] == ["Linux", HOSTNAME, release]
    loaded = {line.split()[0] for line in tour("W17 lsmod").splitlines()[1:]}
    built_in = Path(f"/lib/modules/{release}/modules.builtin").read_text()
    for module, why_not in walkthrough.MODULES.items():
        there = module in loaded or f"/{module.replace('_', '-')}.ko" in built_in or f"/{module}.ko" in built_in
        assert there != bool(why_not), f"{module}: {why_not}"
    mounts = re.findall(r"^(\S+) on (\S+) type (\S+) \(", tour("W17 mount"), re.MULTILINE)
    by_target = {target: (source, kind) for source, target, kind in mounts}
    assert {target: by_target.get(target) for target in walkthrough.MOUNTS} == walkthrough.MOUNTS
    for container in (tour.sandbox, tour.container):
        source, kind = by_target[f"/run/kata-containers/{container}/rootfs"]
        assert (source in ("kataShared", walkthrough.SUBMOUNT), kind) == (True, "virtiofs")


def test_w18_processes(systemd_tour: Tour) -> None:
    """Whatever is the first process: an agent, whose children are pause and the workload."""
    check_processes(systemd_tour("W18 agent"), r"/init$")
    commands = check_processes(systemd_tour("W18 systemd"), r"/usr/bin/kata-agent$")
    assert any(re.search(r"systemd\} /init", command) and parent == 0 for command, parent in commands.items())
    for daemon in ("systemd-journald", "systemd-udevd"):
        assert [parent for command, parent in commands.items() if daemon in command] == [1], commands


def check_processes(said: str, agent: str) -> dict[str, int]:
    """Parents by command; the agent has both containers as its children."""
    found = processes_of(said)
    (sleep,) = (parent for parent, command in found.values() if command == "sleep infinity")
    (pause,) = (parent for parent, command in found.values() if "sleep 1000000 &" in command)
    assert sleep == pause
    assert re.search(agent, found[sleep][1])
    return {command: parent for parent, command in found.values()}


def test_w19_memory_and_command_line(tour: Tour) -> None:
    total = re.search(r"^Mem: +([\d.]+)G", tour("W19 free"), re.MULTILINE)
    assert total is not None
    assert 1.9 <= float(total[1]) <= 2.0
    ours = set(tour("W19 cmdline").split())
    elsewhere = {"reboot=k", "console=hvc0", "console=hvc1", "pci=lastbus=0", "scsi_mod.scan=none"}
    cpus = f"nr_cpus={os.cpu_count()}"
    theirs = {cpus if word.startswith("nr_cpus=") else word for word in walkthrough.KERNEL_PARAMETERS.split()}
    assert theirs - ours == elsewhere  # reasons: docs/walkthrough-qemu.md


def test_w20_units(systemd_tour: Tour) -> None:
    tour = systemd_tour
    states = {}
    for line in tour("W20 units").splitlines():
        words = line.replace("●", " ").split()
        if len(words) >= 4 and words[1] == "loaded":
            states[words[0]] = words[2:4]
    for unit, why_not in walkthrough.UNITS.items():
        assert (states.get(unit, ["missing"])[0] == "active") != bool(why_not), f"{unit}: {why_not}"
    assert states["kata-agent.service"] == ["active", "running"]
    assert rf"run-kata\x2dcontainers-{tour.variables['SYSTEMD']}-rootfs.mount" in states
    assert assignments(tour("W20 target")) == assignments(walkthrough.TARGET)
    service = assignments(tour("W20 service"))
    for line, why_not in walkthrough.SERVICE.items():
        assert (line in service) != bool(why_not), f"{line}: {why_not}"
    assert tour("W20 rootfs").split() == tour("W21 ls").split()


def test_w21_in_the_container(tour: Tour) -> None:
    assert {"bin", "dev", "etc", "proc", "root", "sys", "tmp", "usr"} <= set(tour("W21 ls").split())
    inside, mac = addresses(tour("W21 ip"), "eth0")
    _, outer_mac = addresses(tour("W22 inside"), "eth0")
    assert {f"{tour.pod.addresses[0]}/24"} <= inside
    assert mac == outer_mac
    commands = [line.split(None, 2)[2] for line in tour("W21 ps").splitlines()[1:]]
    assert commands == ["sleep infinity", "ps -o pid,tty,args"]
    answer = tour.cri("Exec", container_id=tour.container, cmd=["sh"], tty=True, stdin=True, stdout=True)
    with open_stream(answer.url, tour.node.netns) as stream:
        stream.expect(b"# ")
        stream.send(b"hostname; tty; exit 6\n")
        stream.expect(rf"{HOSTNAME}\r\n/dev/pts/\d+\r\n".encode())
        assert stream.finish() == 6


def test_w22_namespace_and_interfaces(tour: Tour) -> None:
    qemu = tour.variables["QEMU"]
    # lsns says nothing at all when a process of the machine ends while it looks
    (line,) = wait_for(lambda: tour("W22 lsns").splitlines(), "lsns tells of the pod's namespace")
    netns, kind, pid, command = line.split(None, 3)
    assert (int(netns), kind, pid) == (os.stat(tour.pod.netns).st_ino, "net", qemu)
    assert "qemu" in command
    inside, outside = tour("W22 inside"), tour("W22 outside")
    eth0 = re.search(r"^(\d+): eth0@if(\d+): <.*UP", inside, re.MULTILINE)
    assert eth0 is not None
    assert re.search(r"^\d+: tap0_kata: <.*UP", inside, re.MULTILINE)
    peer = re.search(rf"^{eth0[2]}: \S+@if(\d+): .* master {BRIDGE} ", outside, re.MULTILINE)
    assert peer is not None
    assert peer[1] == eth0[1]


def test_w23_nft_is_untouched_and_passed_by(tour: Tour) -> None:
    assert tour("W23 nft") == ""
    enter = "nsenter -t $QEMU -n nft"
    tour.run(f"{enter} 'add table ip walk; add chain ip walk INPUT {{ type filter hook input priority 0; }}'")
    try:
        tour.run(f"{enter} add rule ip walk INPUT ip protocol icmp counter")
        tour.pod.sh(tour.container, f"ping -c 2 -W 20 {GATEWAY}")
        assert "counter packets 0 bytes 0" in tour("W23 nft"), "tc takes packets before these rules"
        notes = tour("W26 inspect")
        assert "table ip walk" in notes
    finally:
        tour.run(f"{enter} delete table ip walk")


def test_w24_tc(tour: Tour) -> None:
    """The same filters as the walkthrough shows, on both devices, whatever way one asks; and they count."""
    for device, other in (("eth0", "tap0_kata"), ("tap0_kata", "eth0")):
        expected = shape(walkthrough.FILTER.replace("device tap0_kata", f"device {other}"))
        for way in ("root", "ingress", "egress"):
            assert shape(tour(f"W24 {device}-{way}")) == expected
        qdiscs = shape(tour(f"W24 {device}-qdisc"))
        assert "qdisc ingress ffff: parent ffff:fff1 ----------------" in qdiscs
    before = [sent(tour(f"W24 {device}-ingress")) for device in ("eth0", "tap0_kata")]
    tour.pod.sh(tour.container, f"ping -c 3 -W 20 {GATEWAY}")
    after = [sent(tour(f"W24 {device}-ingress")) for device in ("eth0", "tap0_kata")]
    assert all(now >= then + 3 for then, now in zip(before, after, strict=True))


def sent(filters: str) -> int:
    found = re.search(r"Sent \d+ bytes (\d+) pkt", filters)
    assert found is not None
    return int(found[1])


def test_w25_check_names_what_is_needed(tour: Tour) -> None:
    """Where the VMM comes from, and the other programs that the packages require; each with what was found."""
    lines = re.findall(r"^(\w+|-) +(\S.*?)  +(\S.*)$", tour("W25 check"), re.MULTILINE)
    found = {title: (outcome, what) for outcome, title, what in lines}
    for program in ("QEMU", "virtiofsd", "crun", "ip", "tc", "dracut", "guest kernel"):
        assert found[program][0] == "ok", found
    assert "/" in found["QEMU"][1]


def test_w26_inspect(tour: Tour) -> None:
    """One command knows all that the tour has found by hand."""
    said = tour("W26 inspect")
    facts = json.loads(tour.run("kata-runtime inspect --json $SANDBOX"))
    assert json.loads(tour("W26 json")) == sorted(facts)
    assert [one for one in facts["missing"] if one["part"] != "network.nft"] == []
    assert [one["pid"] for one in facts["processes"] if one["role"] == "vmm"] == [int(tour.variables["QEMU"])]
    assert facts["network"]["inode"] == os.stat(tour.pod.netns).st_ino
    assert {(one["source"], one["target"]) for one in facts["network"]["redirects"]} == {
        ("eth0", "tap0_kata"),
        ("tap0_kata", "eth0"),
    }
    guest = facts["guest"]
    loaded = {line.split()[0] for line in tour("W17 lsmod").splitlines()[1:]}
    assert {one["name"] for one in guest["modules"]} == loaded
    mounted = set(re.findall(r"^\S+ on (\S+) type", tour("W17 mount"), re.MULTILINE))
    assert {one["target"] for one in guest["mounts"]} == mounted
    assert "sleep infinity" in {one["command"] for one in guest["processes"]}
    for part in (tour.sandbox, tour.container, "tap0_kata", "vhost-user-fs-pci", "virtiofs", "pidfile", "nft rules"):
        assert part in said
    tour.run("kata-runtime inspect --svg /tmp/walk-$SANDBOX.svg $SANDBOX")
    picture = Path(f"/tmp/walk-{tour.sandbox}.svg")
    try:
        assert "tap0_kata" in picture.read_text()
    finally:
        picture.unlink()
