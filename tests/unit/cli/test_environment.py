"""`kata-runtime env`, `config` and `version`."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from katapod import __version__
from katapod.version import commit

PROGRAM = [sys.executable, "-c", "from katapod.cli.entry import main; main()"]


def call(*args: str) -> tuple[int, str, str]:
    done = subprocess.run([*PROGRAM, *args], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


TREE: dict[str, list[str]] = {
    "Meta": ["Version"],
    "Runtime": [
        "Debug",
        "Trace",
        "DisableGuestSeccomp",
        "DisableNewNetNs",
        "SandboxCgroupOnly",
        "Path",
        "Version",
        "Config",
    ],
    "Hypervisor": [
        "MachineType",
        "Version",
        "Path",
        "BlockDeviceDriver",
        "EntropySource",
        "SharedFS",
        "VirtioFSDaemon",
        "Msize9p",
        "MemorySlots",
        "PCIeRootPort",
        "HotplugVFIOOnRootBus",
        "Debug",
    ],
    "Image": ["Path"],
    "Kernel": ["Path", "Parameters"],
    "Initrd": ["Path"],
    "Agent": ["Debug", "Trace", "TraceMode", "TraceType"],
    "Host": [
        "Kernel",
        "Architecture",
        "VMContainerCapable",
        "SupportVSocks",
        "Distro",
        "CPU",
        "Memory",
    ],
    "Netmon": ["Path", "Debug", "Enable", "Version"],
}
"""Tables and keys of the walkthrough, in its order."""

NEWER = {
    "Runtime": ["GuestSeLinuxLabel"],
    "Hypervisor": ["SocketPath", "HotPlugVFIO", "ColdPlugVFIO", "PCIeSwitchPort", "SecurityInfo"],
    "Host": ["AvailableGuestProtections"],
}
"""What format 1.0.27 has beyond. An empty `Experimental` is left out, as upstream does."""


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("env") / "c.toml"
    path.write_text(
        '[hypervisor.qemu]\nkernel_params = "x=1"\nmemory_slots = 3\nenable_debug = true\npath = "/no/qemu"\n'
        "[agent.kata]\ndebug_console_enabled = true\nenable_debug = true\n"
    )
    return path


@pytest.fixture(scope="module")
def tree(configuration: Path) -> dict[str, Any]:
    code, out, err = call("--config", str(configuration), "env", "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def test_tables_and_keys_in_the_order_of_the_walkthrough(tree: dict[str, Any]) -> None:
    assert list(tree) == list(TREE)
    for table, keys in TREE.items():
        newer = NEWER.get(table, [])
        assert [key for key in tree[table] if key not in newer] == keys
        assert {key for key in tree[table] if key not in keys} == set(newer)
    assert list(tree["Runtime"]["Version"]["Version"]) == ["Semver", "Major", "Minor", "Patch", "Commit"]


def test_values_are_this_hosts_and_the_configurations(tree: dict[str, Any], configuration: Path) -> None:
    assert tree["Host"]["Kernel"] == os.uname().release
    assert tree["Host"]["CPU"]["CPUs"] == os.cpu_count()
    assert tree["Host"]["Memory"]["Total"] > tree["Host"]["Memory"]["Available"] > 0
    assert tree["Runtime"]["Config"]["Path"] == str(configuration)
    assert tree["Runtime"]["Version"]["Version"]["Semver"] == __version__
    assert tree["Hypervisor"]["MemorySlots"] == 3
    assert tree["Hypervisor"]["Debug"] is True
    assert tree["Hypervisor"]["Version"] == "<<unknown>>"
    assert tree["Kernel"]["Parameters"].endswith(
        "agent.debug_console agent.debug_console_vport=1026 agent.log=debug x=1"
    )


def test_toml_says_the_same(tree: dict[str, Any], configuration: Path, tmp_path: Path) -> None:
    assert call("--config", str(configuration), "env", "-f", str(tmp_path / "out")) == (0, "", "")
    found = tomllib.loads((tmp_path / "out").read_text())
    for one in (found, tree):
        del one["Host"]["Memory"]
    assert found == tree


def test_user_mode_linux_where_it_is_forced(tmp_path: Path) -> None:
    forced = tmp_path / "forced.toml"
    forced.write_text('[hypervisor.uml]\nkernel = "/img/linux"\nimage = "/img/disk"\n[katapod]\naccelerator = "uml"\n')
    code, out, _ = call("--config", str(forced), "env", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["Hypervisor"]["Path"], found["Kernel"]["Path"]) == ("/img/linux", "/img/linux")
    assert (found["Image"]["Path"], found["Initrd"]["Path"]) == ("/img/disk", "")
    assert "lpj=" in found["Kernel"]["Parameters"]


def test_the_commit_is_gits() -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert commit() == (done.stdout.strip() or "unknown")
    assert call("version") == (0, f"kata-runtime  : {__version__}\n   commit   : {commit()}\n   OCI specs: 1.0.2\n", "")


def test_check_says_all_that_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("[hypervisor.qemu]\nrootless = true\nuse_vsock = true\ndefault_memroy = 1\n")
    code, out, err = call("config", "check", str(bad))
    assert (code, err) == (1, "")
    assert [line.partition(": [")[0] for line in out.splitlines()] == [
        f"refused: {bad}:2",
        f"obsolete: {bad}:3",
        f"error: {bad}:4",
    ]
    bad.write_text('[hypervisor.qemu]\nkernel = "/no/kernel"\n')
    code, out, _ = call("config", "check", str(bad))
    assert code == 1
    assert "/no/kernel" in out
    assert call("config", "check", str(tmp_path / "none"))[0] == 1


def test_show_names_the_file_of_each_value(configuration: Path) -> None:
    code, out, _ = call("--config", str(configuration), "config", "show", "--json")
    assert code == 0
    shown = json.loads(out)["config"]["hypervisor.qemu"]
    assert shown["memory_slots"] == {"value": 3, "origin": str(configuration)}
    assert shown["default_memory"] == {"value": 2048, "origin": "default"}
