"""`kata-runtime check`: facts in, lines out."""
# ruff: noqa: E501 - a table

from typing import Any

import pytest
from msgspec.structs import replace

from katapod.observe.check import Report, judge
from katapod.observe.check_facts import (
    AcceleratorFacts,
    CheckFacts,
    DeviceFacts,
    EngineFacts,
    ImageFacts,
    Line,
    ModuleState,
    Outcome,
    ProgramFacts,
    RungFacts,
    SpaceFacts,
    Trial,
    shown_duration,
)
from katapod.observe.check_machine import BRIDGE_PLUGINS, MORE_PLUGINS, TRIALS
from katapod.observe.check_software import PROGRAMS

DEVICES = (
    DeviceFacts("/dev/kvm", "", "kvm", ModuleState.LOADED),
    DeviceFacts("/dev/vhost-vsock", "", "vhost_vsock", ModuleState.LOADED),
    DeviceFacts("/dev/vhost-net", "", "vhost_net", ModuleState.LOADED),
    DeviceFacts("/dev/net/tun", "", "tun", ModuleState.LOADED),
)
QEMU = ProgramFacts("qemu", "/usr/bin/qemu-system-x86_64", True, "QEMU emulator version 7.2.22 (Debian 1:7.2)")
IMAGE = ImageFacts("/c/kernel", "/c/initrd", complete=True, kernel_version="6.1.0", newest_kernel="6.1.0", age_s=90)
ENGINE = EngineFacts(
    "containerd", ProgramFacts("containerd", "/usr/bin/containerd", True, "1.7.0"), ("kata",), ("/etc/c",)
)
GOOD = CheckFacts(
    root=True,
    architecture="x86_64",
    cpu_vendor="GenuineIntel",
    cpu_flags=frozenset({"vmx", "lm"}),
    cpus=4,
    kernel_release="6.1.0",
    devices=DEVICES,
    configuration="built-in defaults",
    configuration_error="",
    programs=(QEMU, *(ProgramFacts(name, f"/usr/bin/{name}", True, "1.0") for name in PROGRAMS)),
    image=IMAGE,
    accelerator=AcceleratorFacts("auto", "kvm", "the guest image boots under KVM", 30.0),
    kvm=RungFacts(True, reason="the guest image boots under KVM", age_s=30.0),
    uml=RungFacts(True, reason="the guest image boots under User-mode Linux", age_s=30.0),
    cgroup_version=2,
    cgroup_controllers=frozenset({"cpu", "memory", "pids"}),
    cgroup_writable=True,
    trials={key: Trial(True) for key in (*TRIALS, "overlay", "jail")},
    cni_plugins={name: f"/opt/cni/bin/{name}" for name in (*BRIDGE_PLUGINS, *MORE_PLUGINS)},
    cni_dirs=("/opt/cni/bin",),
    cni_networks=(),
    cni_problems=(),
    mem_mib=8192,
    mem_available_mib=6000,
    default_memory_mib=2048,
    spaces={
        "state": SpaceFacts("/run/vc/sbs", 900, "tmpfs"),
        "data": SpaceFacts("/var/lib/katapod/images", 20000, "ext4"),
        "cache": SpaceFacts("/var/cache/kata-containers", 20000, "ext4"),
        "templates": SpaceFacts("/run/vc/vm/template", 900, "tmpfs"),
    },
    capabilities=frozenset(
        {"CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_MKNOD", "CAP_DAC_OVERRIDE", "CAP_CHOWN", "CAP_SYS_RESOURCE"}
    ),
    open_files=1 << 20,
    shim="/usr/bin/containerd-shim-kata-v2",
    engines=(ENGINE, EngineFacts("crio", ProgramFacts("crio", "", False))),
)


def line(line_id: str, **changes: Any) -> Line:
    return {line.line_id: line for line in judge(replace(GOOD, **changes)).lines}[line_id]


def device(path: str, **changes: Any) -> tuple[DeviceFacts, ...]:
    return tuple(replace(each, **changes) if each.path == path else each for each in DEVICES)


def program(name: str, **changes: Any) -> tuple[ProgramFacts, ...]:
    return tuple(replace(each, **changes) if each.name == name else each for each in GOOD.programs)


def space(key: str, **changes: Any) -> dict[str, SpaceFacts]:
    return {**GOOD.spaces, key: replace(GOOD.spaces[key], **changes)}


def test_a_good_host_has_all() -> None:
    report = judge(GOOD)
    assert {each.line_id for each in report.lines if each.outcome is not Outcome.OK} == {"engine.crio", "tcg"}
    assert report.passes(strict=True)
    assert "ok      QEMU: 7.2.22 (/usr/bin/qemu-system-x86_64)" in report.describe().splitlines()


NO_NODE = "No such file or directory"
CASES: list[tuple[str, dict[str, Any], Outcome, str, str]] = [
    # line, what is otherwise, outcome, part of what was found, part of the remedy
    ("cpu", {"architecture": "riscv64"}, Outcome.MISSING, "riscv64", "x86_64"),
    (
        "cpu",
        {"cpu_flags": frozenset(), "accelerator": AcceleratorFacts("auto", "tcg", "this host has no /dev/kvm")},
        Outcome.LESS,
        "without vmx",
        "VT-x",
    ),
    ("cpu", {"cpu_flags": frozenset()}, Outcome.OK, "KVM works without its flag", ""),
    ("kvm", {"devices": device("/dev/kvm", error=NO_NODE, module_state=ModuleState.LOADABLE)}, Outcome.LESS, NO_NODE, "modprobe kvm_intel"),
    ("kvm", {"devices": device("/dev/kvm", error=NO_NODE)}, Outcome.LESS, NO_NODE, "give this machine or container the node"),
    ("kvm", {"root": False, "devices": device("/dev/kvm", error="Permission denied")}, Outcome.UNKNOWN, "denied", "as root"),
    ("accelerator", {"accelerator": AcceleratorFacts("auto", "tcg", "no", 7200.0)}, Outcome.LESS, "found out 2 hours ago", "--boot"),
    ("accelerator", {"accelerator": AcceleratorFacts("tcg", "tcg", "forced")}, Outcome.LESS, "forced", '"auto"'),
    ("accelerator", {"accelerator": AcceleratorFacts("kvm", "kvm", "it boots")}, Outcome.OK, "it boots", ""),
    ("accelerator", {"accelerator": AcceleratorFacts("kvm")}, Outcome.UNKNOWN, "not found out yet", "--boot"),
    ("accelerator", {"accelerator": AcceleratorFacts("auto", "tcg", "no", advice="set x")}, Outcome.LESS, "no", "set x"),
    ("accelerator", {"accelerator": AcceleratorFacts("kvm", "", "no", advice="set x")}, Outcome.MISSING, "no", "set x"),
    ("accelerator", {"accelerator": AcceleratorFacts("kvm", "", "no answer")}, Outcome.MISSING, "no answer", "/dev/kvm"),
    ("accelerator", {"accelerator": AcceleratorFacts("auto")}, Outcome.UNKNOWN, "not found out yet", "--boot"),
    ("accelerator", {"accelerator": AcceleratorFacts("auto", "uml", "it boots")}, Outcome.OK, "uml (User-mode Linux): it boots", ""),
    ("accelerator", {"accelerator": AcceleratorFacts("uml", "", "no")}, Outcome.MISSING, "uml is forced: no", "image build"),
    ("kvm.guests", {}, Outcome.OK, "boots under KVM, found out 30 s ago", ""),
    ("kvm.guests", {"kvm": RungFacts()}, Outcome.NOTE, "not found out yet", "--boot"),
    ("kvm.guests", {"kvm": RungFacts(False, reason="no", advice="set x")}, Outcome.NOTE, "no", "set x"),
    ("tcg", {}, Outcome.NOTE, "works", ""),
    ("uml", {}, Outcome.OK, "boots under User-mode Linux, found out 30 s ago", ""),
    ("uml", {"uml": RungFacts()}, Outcome.NOTE, "not found out yet", "--boot"),
    ("uml", {"uml": RungFacts(False, reason="it panics")}, Outcome.NOTE, "it panics", "--boot"),
    ("uml", {"uml": RungFacts(installed=False, reason="/k: none")}, Outcome.NOTE, "/k: none", "apt-get install"),
    ("device.vsock", {"devices": device("/dev/vhost-vsock", error=NO_NODE, module_state=ModuleState.LOADABLE)}, Outcome.LESS, NO_NODE, "modprobe vhost_vsock"),
    ("device.vhost-net", {"devices": device("/dev/vhost-net", error=NO_NODE, module_state=ModuleState.ABSENT)}, Outcome.LESS, NO_NODE, "no module vhost_net"),
    ("device.tun", {"root": False, "devices": device("/dev/net/tun", error="Permission denied")}, Outcome.UNKNOWN, "denied", "root"),
    ("cgroup", {"cgroup_version": 0, "cgroup_controllers": frozenset()}, Outcome.LESS, "not mounted", "cgroup v2"),
    ("cgroup", {"cgroup_controllers": frozenset({"cpu"})}, Outcome.LESS, "version 2", "cgroup v2"),
    ("cgroup", {"cgroup_writable": False}, Outcome.LESS, "read-only", "writable"),
    ("net.netns", {"trials": {"netns": Trial(False, "no room")}}, Outcome.MISSING, "no room", "CONFIG_NET_NS"),
    ("net.ingress", {"trials": {"ingress": Trial(False, "Specified qdisc not found.")}}, Outcome.LESS, "not found", "modprobe sch_ingress"),
    ("net.redirect", {"trials": {"redirect": Trial(False, "x")}}, Outcome.LESS, "x", "modprobe -a cls_u32 act_mirred"),
    ("net.matchall", {"trials": {"matchall": Trial(False, "x")}}, Outcome.NOTE, "x", "cls_matchall"),
    ("net.tap", {"trials": {}}, Outcome.UNKNOWN, "not tried", "as root"),
    ("cni", {"cni_plugins": {}}, Outcome.LESS, "no bridge", "apt-get install containernetworking-plugins"),
    ("cni", {"cni_problems": ("/etc/x: no name",)}, Outcome.LESS, "/etc/x: no name", "correct"),
    ("cni", {"cni_networks": ("blue",)}, Outcome.OK, "networks: blue", ""),
    ("overlay", {"trials": {"overlay": Trial(False, "denied")}}, Outcome.MISSING, "denied", "modprobe overlay"),
    ("overlay", {"trials": {}}, Outcome.UNKNOWN, "not tried", "root"),
    ("jail", {"trials": {"jail": Trial(False, "denied")}}, Outcome.MISSING, "denied", "jail_uids"),
    ("jail", {"trials": {}}, Outcome.UNKNOWN, "not tried", "root"),
    ("overlay", {"spaces": space("data", fs_type="overlay")}, Outcome.MISSING, "overlay itself", "mount a volume"),
    ("space.data", {"spaces": space("data", free_mib=100)}, Outcome.LESS, "100 MiB free", "1024 MiB"),
    ("space.cache", {"spaces": space("cache", free_mib=3)}, Outcome.MISSING, "3 MiB free", "free space"),
    ("space.state", {"spaces": space("state", error="Input/output error")}, Outcome.MISSING, "Input/output", "usable"),
    ("templates", {"spaces": space("templates", fs_type="ext4")}, Outcome.LESS, "on ext4", "template_path"),
    ("templates", {"spaces": {}}, Outcome.NOTE, "enable_template = false", ""),
    ("memory", {"mem_available_mib": 100}, Outcome.MISSING, "100 of 8192", "free memory"),
    ("memory", {"mem_available_mib": 1000}, Outcome.LESS, "1000 of 8192", "default_memory"),
    ("capabilities", {"capabilities": GOOD.capabilities - {"CAP_SYS_RESOURCE"}}, Outcome.LESS, "CAP_SYS_RESOURCE", "--cap-add"),
    ("capabilities", {"capabilities": frozenset()}, Outcome.MISSING, "no CAP_SYS_ADMIN", "container"),
    ("capabilities", {"root": False}, Outcome.UNKNOWN, "not root", "as root"),
    ("open-files", {"open_files": 1024}, Outcome.LESS, "1024", "LimitNOFILE=65536"),
    ("configuration", {"configuration_error": "x.toml: [runtime] y: no"}, Outcome.MISSING, "[runtime] y", "configuration.md"),
    ("program.qemu", {"programs": program("qemu", found=False)}, Outcome.MISSING, "is not a program", "apt-get install qemu-system-x86   (dnf install qemu-kvm)"),
    ("program.qemu", {"programs": program("qemu", version="")}, Outcome.MISSING, "does not say its version", "qemu"),
    ("program.qemu", {"programs": program("qemu", version="QEMU emulator version 5.2.0")}, Outcome.LESS, "5.2.0", "newer"),
    ("program.virtiofsd", {"programs": program("virtiofsd", found=False, path="/x")}, Outcome.MISSING, "not in /x", "dnf install virtiofsd"),
    ("program.tc", {"programs": program("tc", found=False, path="")}, Outcome.LESS, "not installed", "dnf install iproute-tc"),
    ("program.skopeo", {"programs": program("skopeo", found=False, path="")}, Outcome.LESS, "not installed", "skopeo"),
    ("image.kernel", {"image": replace(IMAGE, kernel_error="a link to x, which is not there")}, Outcome.MISSING, "a link to x", "kata-runtime image build"),
    ("image.initrd", {"image": replace(IMAGE, initrd_error=NO_NODE)}, Outcome.MISSING, NO_NODE, "kata-runtime image build"),
    ("image", {"image": replace(IMAGE, complete=False)}, Outcome.MISSING, "do not agree", "image build"),
    ("image", {"image": replace(IMAGE, newest_kernel="6.2.0")}, Outcome.LESS, "kernel 6.1.0", "image build"),
    ("image", {"image": replace(IMAGE, built_in_place=False)}, Outcome.NOTE, "of its own", ""),
    ("image.boots", {"accelerator": AcceleratorFacts("auto", "kvm", boot=Trial(True), boot_s=3.21)}, Outcome.OK, "in 3.2 s under kvm", ""),
    ("image.boots", {"accelerator": AcceleratorFacts("auto", "tcg", boot=Trial(False, "panic"))}, Outcome.MISSING, "panic", "image build"),
    ("image.boots", {"image": replace(IMAGE, built_in_place=False)}, Outcome.UNKNOWN, "--boot", "--boot"),
    ("shim", {"shim": ""}, Outcome.LESS, "containerd-shim-kata-v2", "make install"),
    ("shim", {"shim": "", "engines": (GOOD.engines[1],)}, Outcome.NOTE, "no engine", ""),
    ("engine.containerd", {"engines": (replace(ENGINE, handlers=()),)}, Outcome.LESS, "without a handler", "packaging/containerd/kata.toml"),
    ("engine.containerd", {"engines": (replace(ENGINE, problem="cannot read x: bad"),)}, Outcome.LESS, "bad", "correct"),
    ("engine.containerd", {"engines": (replace(ENGINE, problem="cannot read x: Permission denied"),)}, Outcome.UNKNOWN, "denied", "root"),
]  # fmt: skip


@pytest.mark.parametrize(("line_id", "changes", "outcome", "found", "remedy"), CASES)
def test_verdict(line_id: str, changes: dict[str, Any], outcome: Outcome, found: str, remedy: str) -> None:
    verdict = line(line_id, **changes)
    assert verdict.outcome is outcome
    assert found in verdict.found
    assert remedy in verdict.remedy
    if outcome in (Outcome.LESS, Outcome.MISSING, Outcome.UNKNOWN):
        assert verdict.remedy, "says what to do"


def test_every_line_has_a_case_in_which_it_is_not_ok() -> None:
    assert {each.line_id for each in judge(GOOD).lines} - {
        line_id for line_id, _, outcome, *_ in CASES if outcome is not Outcome.OK
    } <= {
        "engine.crio",
        *(f"net.{key}" for key in TRIALS),
        *(f"program.{name}" for name in PROGRAMS),
    }


@pytest.mark.parametrize(
    ("outcomes", "capable", "strict"),
    [
        ([Outcome.OK, Outcome.NOTE], True, True),
        ([Outcome.OK, Outcome.LESS], True, False),
        ([Outcome.OK, Outcome.UNKNOWN], True, False),
        ([Outcome.LESS, Outcome.MISSING], False, False),
    ],
)
def test_what_counts(outcomes: list[Outcome], capable: bool, strict: bool) -> None:
    lines = tuple(Line(str(number), "x", outcome, "") for number, outcome in enumerate(outcomes))
    report = Report(lines, root=True)
    assert (report.passes(strict=False), report.passes(strict=True)) == (capable, strict)


def test_ages() -> None:
    assert [shown_duration(seconds) for seconds in (-1, 5, 119, 120, 7200, 200000)] == [
        "0 s", "5 s", "119 s", "2 minutes", "2 hours", "2 days",
    ]  # fmt: skip
