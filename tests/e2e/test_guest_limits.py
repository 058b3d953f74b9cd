"""A clone of a template has every limit that a cold boot of its size has: all of /proc/sys, and those of processes."""

import contextlib
import re
from pathlib import Path

import pytest

from kit.containerd import CONSOLE_CONFIG
from kit.kata import Kata
from kit.templates import with_templates

LOOK = """
cd /proc/sys; grep -rs . *
sed 's/   */: /' /proc/1/limits
for name in enabled defrag use_zero_page khugepaged/defrag; do
echo huge pages $name: $(cat /sys/kernel/mm/transparent_hugepage/$name); done
df -P /dev /run /tmp /dev/shm | while read name size rest; do echo "tmpfs ${rest##* }:" $size; done
"""
LOOK_INSIDE = "sed 's/  */ /g' /proc/self/limits"

DIFFERENT = {
    r"kernel/random/(boot_id|uuid)": "each machine's own",
    r"kernel/(hostname|ns_last_pid)": "each machine's own",
    r"fs/(dentry-state|inode-nr|inode-state|file-nr|aio-nr)": "counts of what is in use, no limits",
    r"fs/quota/.*": "counts",
    r"net/ipv4/tcp_ehash_entries": "the size of a hash table: it is made at boot, and no kernel changes it later",
}
"""What may differ, by regular expressions on keys, and why."""

NEARLY = 0.01
"""The kernel takes limits from the pages that it counts at moments of its boot; the agent, from those at one moment.
The kernel itself keeps vm/user_reserve_kbytes and vm/min_free_kbytes up to date, from what is free."""


def _look(kata: Kata, config: Path, *, templates: bool) -> tuple[dict[str, str], str]:
    name = kata.name()
    kata._started.append(name)
    with with_templates(templates):
        kata.ok(
            "--config", str(config), "run", "-d", "--name", name, "-m", "3g", "busybox", "sleep", "1000", timeout=180
        )
        machine = kata.ok("exec", "--vm", name, "sh", "-c", LOOK, timeout=180)
        inside = kata.ok("exec", name, "sh", "-c", LOOK_INSIDE)
    kata.remove_started()
    found = dict(line.split(":", 1) for line in machine.splitlines())
    return {key: " ".join(value.split()) for key, value in found.items()}, inside


@pytest.fixture(scope="module")
def both(module_kata: Kata, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, str], str]]:
    folder = tmp_path_factory.mktemp("limits")
    (folder / "clone.toml").write_text(CONSOLE_CONFIG)
    (folder / "cold.toml").write_text(f"{CONSOLE_CONFIG}\n[factory]\nenable_template = false\n")
    return [
        _look(module_kata, folder / "clone.toml", templates=True),
        _look(module_kata, folder / "cold.toml", templates=False),
    ]


def _differ(one: str, other: str) -> bool:
    with contextlib.suppress(ValueError):
        pairs = zip(one.split(), other.split(), strict=True)
        return any(abs(int(a) - int(b)) > NEARLY * abs(int(b)) for a, b in pairs)
    return one != other


@pytest.mark.qemu("templates")
def test_all_of_proc_sys(both: list[tuple[dict[str, str], str]]) -> None:
    (clone, _), (cold, _) = both
    assert clone.keys() == cold.keys()
    assert len(clone) > 800
    different = {
        key: (clone[key], cold[key])
        for key in cold
        if _differ(clone[key], cold[key]) and not any(re.fullmatch(pattern, key) for pattern in DIFFERENT)
    }
    assert different == {}, "(clone, cold boot)"
    assert int(clone["kernel/threads-max"]) > 25_000
    assert clone["huge pages enabled"].startswith("[always]")


@pytest.mark.qemu("templates")
def test_limits_of_containers(both: list[tuple[dict[str, str], str]]) -> None:
    """Equal too, and as engines give them where the kernel's own are small."""
    (_, clone), (_, cold) = both
    assert clone == cold
    assert "Max open files 1048576 1048576 files" in clone
