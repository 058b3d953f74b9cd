"""The tree for people: nothing that a guest says steers the terminal, and it fits the width."""

import io

from rich.console import Console

from katapod.cli.inspect_tree import build_tree
from katapod.model import inspection as facts

HOSTILE = "\x1b]0;owned\x07[red]x[/red]\r\n\u202e\x9b31m"


def shown(sandbox: facts.SandboxFacts, width: int, *, everything: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    console.print(build_tree(sandbox, everything=everything))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def sandbox() -> facts.SandboxFacts:
    return facts.SandboxFacts(
        sandbox_id="s1",
        state="running",
        taken_at=10.0,
        containers=(facts.ContainerFacts(container_id="c1", name=HOSTILE, command=(HOSTILE,)),),
        command_line=(facts.OptionPart("-x", "?", known=False),),
        guest=facts.GuestFacts(
            kernel=HOSTILE,
            processes=tuple(facts.GuestProcess(pid=n, command=HOSTILE, container="c1") for n in range(60)),
            modules=tuple(facts.KernelModule(f"m{n}") for n in range(60)),
        ),
        missing=(facts.Missing("network", HOSTILE),),
    )


def test_control_characters_are_shown() -> None:
    text = shown(sandbox(), 120)
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "\\u001b]0;owned\\u0007[red]x[/red]\\r\\n\\u202e\\u009b31m" in shown(sandbox(), 400)


def test_width() -> None:
    assert max(map(len, shown(sandbox(), 60).splitlines())) <= 60


def test_long_lists_are_cut_unless_all_is_wanted() -> None:
    assert "and 20 more (--all)" in shown(sandbox(), 120)
    text = shown(sandbox(), 120, everything=True)
    assert "more (--all)" not in text
    assert "m59" in text


def test_what_confines_a_vmm_is_shown() -> None:
    jail = facts.Confinement(no_new_privileges=True, seccomp=True, namespaces=("mnt", "pid"))
    root = facts.Confinement(capabilities=(0, 21))
    processes = (
        facts.Process(pid=5, parent=1, role="vmm", command=("linux.uml",), user=7000, confinement=jail),
        facts.Process(pid=6, parent=1, role="virtiofsd", command=("virtiofsd",), confinement=root),
        facts.Process(pid=7, parent=1, role="supervisor", command=("kata-runtime",), confinement=root),
    )
    text = shown(facts.SandboxFacts(sandbox_id="s1", state="running", taken_at=1.0, processes=processes), 160)
    assert "user 7000, no capability, no new privileges, system calls filtered, its own mnt pid" in text
    assert text.count("user 0, 2 capabilities, all system calls") == 1


def test_helpers_of_a_kernel_stand_in_one_line() -> None:
    """They have its command line, which says nothing of them."""
    words = ("linux.uml /run/vc/vm/s1", "mem=256M")
    kernel = facts.Process(pid=5, parent=1, role="vmm", command=words)
    helpers = [facts.Process(pid=100 + n, parent=5, role="vmm-helper", command=words) for n in range(50)]
    disks = facts.Process(pid=4, parent=1, role="storage", command=("qemu-storage-daemon /run/vc/vm/s1", "--blockdev"))
    found = facts.SandboxFacts(sandbox_id="s1", state="running", taken_at=1.0, processes=(disks, kernel, *helpers))
    text = shown(found, 400)
    assert "vmm linux.uml 5  " in text
    assert "storage qemu-storage-daemon 4  " in text
    assert "50 helpers  100, 101, " in text
    assert "139, and 10 more, 0.0 s of CPU" in text
    assert "mem=256M" not in text


def test_devices_on_record() -> None:
    devices = (
        facts.RecordedDevice(
            kind="disk", name="root-1", slot=2, host="/l", backing="/b", guest_path="02/02", in_vmm=True
        ),
        facts.RecordedDevice(kind="nic", name="eth0", slot=31, host="tap0_kata", guest_path="02/1f", in_vmm=False),
        facts.RecordedDevice(kind="memory", name="0", size_mib=128),
    )
    qemu = facts.Process(pid=7, parent=1, role="vmm", command=("/usr/bin/qemu-system-x86_64", "-S"))
    text = shown(
        facts.SandboxFacts(sandbox_id="s1", state="running", taken_at=1.0, devices=devices, processes=(qemu,)), 150
    )
    assert "disk root-1  slot 2  host /l  over /b  guest path 02/02\n" in text
    assert "nic eth0  slot 31  host tap0_kata  guest path 02/1f  the VMM does not have it\n" in text
    assert "memory 0  128 MiB\n" in text
    assert "vmm qemu-system-x86_64 7  " in text
