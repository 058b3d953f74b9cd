"""`-m`, `--cpus` and `--pids-limit`: the VM and the cgroup have that size, and what exceeds it is ended alone."""

import os
import re

import pytest

from kit.kata import Kata

LIMIT_MIB = 96


@pytest.fixture(scope="module")
def box(module_kata: Kata) -> str:
    return module_kata.start(
        *("-m", f"{LIMIT_MIB}m", "--cpus", "0.5", "--pids-limit", "40", "--ulimit", "nofile=100:200"),
        *("--shm-size", "512m", "busybox", "sleep", "1000"),
    )


def _total_mib(kata: Kata, name: str) -> int:
    found = re.search(r"MemTotal: +(\d+) kB", kata.ok("exec", name, "cat", "/proc/meminfo"))
    assert found
    return int(found[1]) >> 10


@pytest.mark.smoke
def test_cgroup_has_the_limits(kata: Kata, box: str) -> None:
    files = [f"/sys/fs/cgroup/{name}" for name in ("memory.max", "memory.swap.max", "cpu.max", "pids.max")]
    out = kata.ok("exec", box, "sh", "-c", f"cat {' '.join(files)} || true").splitlines()
    assert out[0] == str(LIMIT_MIB << 20)
    assert out[-2:] == ["50000 100000", "40"]


@pytest.mark.smoke
@pytest.mark.qemu("several vCPUs")
def test_vm_has_the_size(kata: Kata) -> None:
    """Two CPUs for 1.5; the limit and what the guest itself needs, in blocks of 128 MiB."""
    box = kata.start("-m", f"{LIMIT_MIB}m", "--cpus", "1.5", "busybox", "sleep", "1000")
    assert kata.ok("exec", box, "cat", "/sys/fs/cgroup/cpu.max") == "150000 100000\n"
    assert kata.ok("exec", box, "nproc") == "2\n"
    listed = kata.listed(box)
    assert listed["vcpus"] == 2
    assert listed["memory_mib"] % 128 == 0
    assert LIMIT_MIB + 128 <= listed["memory_mib"] <= LIMIT_MIB + 384
    assert listed["memory_mib"] - 80 < _total_mib(kata, box) <= listed["memory_mib"]


def test_container_without_limits_has_the_default_vm(kata: Kata) -> None:
    name = kata.start("busybox", "sleep", "1000")
    out = kata.ok("exec", name, "sh", "-c", "nproc; cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max")
    assert out.splitlines() == ["1", "max", "max 100000"]
    assert 1700 < _total_mib(kata, name) <= 2048


def test_memory_within_the_limit_can_be_used(kata: Kata, box: str) -> None:
    """All but what the container's other processes take."""
    size = (LIMIT_MIB - 8) << 20
    out = kata.ok("exec", box, "sh", "-c", f"dd if=/dev/zero of=/dev/null bs={size} count=1 2>&1 && echo done")
    assert out.splitlines()[-1] == "done"


def test_process_over_the_limit_is_killed_alone(kata: Kata, box: str) -> None:
    """The container's main process and the VM live on."""
    assert kata("exec", box, "tail", "/dev/zero").code == 137
    assert kata.ok("exec", box, "cat", "/proc/1/comm") == "sleep\n"
    assert re.search(r"oom_kill [1-9]", kata.ok("exec", box, "cat", "/sys/fs/cgroup/memory.events"))
    assert kata.listed(box)["state"] == "running"


def test_container_over_its_limit_is_killed_and_said_so(kata: Kata) -> None:
    code, out, err = kata.run("-m", "48m", "busybox", "tail", "/dev/zero")
    assert (code, out) == (137, "")
    assert "out of memory" in err
    assert "48 MiB" in err


def test_a_container_that_outlives_its_child_was_not_killed(kata: Kata) -> None:
    code, out, err = kata.run("-m", "48m", "busybox", "sh", "-c", "tail /dev/zero; echo $?")
    assert (code, out) == (0, "137\n")
    assert "lost a process, which was killed: out of memory (its limit: 48 MiB)" in err


def test_out_of_memory_is_recorded(kata: Kata) -> None:
    name = kata.name()
    assert kata("run", "--name", name, "-m", "48m", "busybox", "tail", "/dev/zero").code == 137
    listed = kata.listed(name)
    assert (listed["state"], listed["exit_code"], listed["oom_killed"]) == ("stopped", 137, True)
    kata.ok("delete", name)


def test_shm_counts(kata: Kata, box: str) -> None:
    """Memory in /dev/shm is the container's too: more than the limit does not fit, whatever the size of /dev/shm."""
    assert "512.0M" in kata.ok("exec", box, "df", "-h", "/dev/shm")
    script = f"dd if=/dev/zero of=/dev/shm/big bs=1048576 count={LIMIT_MIB + 8}"
    # removed by who is there already: another exec may not find room
    assert kata("exec", box, "sh", "-c", f"{script}; code=$?; rm /dev/shm/big; exit $code").code == 137
    assert kata.ok("exec", box, "ls", "/dev/shm") == ""


def test_processes_over_the_limit_are_refused(kata: Kata, box: str) -> None:
    """The shell collects its children: nobody else does, the container's first process being `sleep`."""
    script = "trap 'kill $pids; wait' EXIT; for i in $(seq 60); do sleep 100 & pids=\"$pids $!\"; done"
    result = kata("exec", box, "sh", "-c", script)
    assert result.code == 2
    assert "can't fork: Resource temporarily unavailable" in result.stderr
    assert kata.ok("exec", box, "echo", "still here") == "still here\n"


def test_ulimit(kata: Kata, box: str) -> None:
    assert kata.ok("exec", box, "sh", "-c", "ulimit -Sn; ulimit -Hn").split() == ["100", "200"]
    assert re.search(r"Max open files +100 +200 ", kata.ok("exec", box, "cat", "/proc/1/limits"))


@pytest.mark.qemu("several vCPUs")
def test_more_than_the_host_has_gets_what_there_is(kata: Kata) -> None:
    """As in a pod whose limits are above the node's: the VM is clamped, with a word, and the cgroups are as asked."""
    script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max; nproc; grep MemTotal /proc/meminfo"
    code, out, err = kata.run("-m", "100000g", "--cpus", "1000", "busybox", "sh", "-c", script, timeout=180)
    assert code == 0, err
    memory, cpu, vcpus, total = out.splitlines()
    assert (int(memory), cpu) == (100_000 << 30, "100000000 100000")
    assert int(vcpus) == len(os.sched_getaffinity(0))
    host_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    assert host_mib * 0.9 < int(total.split()[1]) >> 10 <= host_mib
    memory_told, cpus_told = err.splitlines()
    assert f"this host has {host_mib} MiB" in memory_told
    assert "CPU limit of 1000" in cpus_told
