"""`run --accel uml`: containers on a kernel that is a program of the host, whatever this run's accelerator is."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import SHARED, container_state, fresh_name, leftovers, processes_of, wait_until

from katapod.host.cgroup import host_hierarchies
from katapod.host.descendants import descendants
from katapod.model.flavour import initrd_link, kernel_link
from katapod.model.sizing import HOST_OVERHEAD_MIB
from katapod.observe.memory_use import parse_smaps
from kit.kata import Kata, wait_for

CACHE = Path("/var/cache/kata-containers")
DISK = CACHE / initrd_link("agent", "uml")
RUN = ("run", "--accel", "uml", "--net", "none")

pytestmark = pytest.mark.skipif(not DISK.exists(), reason="needs a guest image for User-mode Linux: image build")


@pytest.fixture(scope="module")
def box(module_kata: Kata) -> str:
    return module_kata.start("--accel", "uml", "--tmpfs", "/load:size=220m", "busybox", "sleep", "1000")


def memory_of(kata: Kata, name: str) -> dict[str, int]:
    """Of `kata-runtime overhead`, in KiB."""
    memory: dict[str, int] = json.loads(kata.ok("overhead", "--json", "--from", name))["observations"][0]["memory"]
    return memory


def guest_mib(kata: Kata, name: str) -> float:
    memory = memory_of(kata, name)
    return (memory["guest_mapped_kib"] + memory["guest_unmapped_kib"]) / 1024


def test_output_exit_status_and_kernel(kata: Kata) -> None:
    version = (CACHE / kernel_link("agent", "uml")).resolve().parent.name.partition("+")[0]
    done = kata(*RUN, "--rm", "busybox", "sh", "-c", "uname -r; echo to-err >&2; exit 7")
    assert done == (7, f"{version}\n", "to-err\n")


def test_streams_carry_all_that_is_sent(kata: Kata) -> None:
    data = os.urandom(3 << 20).hex()
    done = kata(*RUN, "--rm", "-i", "busybox", "cat", input=data)
    assert (done.code, done.stdout == data) == (0, True)


def test_exec_and_a_terminal(kata: Kata, box: str) -> None:
    assert kata("exec", box, "sh", "-c", "echo in; exit 3") == (3, "in\n", "")
    assert kata.ok("exec", "-t", box, "sh", "-c", "test -t 1 && tty").strip() == "/dev/pts/0"


def test_files_of_the_host_and_of_the_container(kata: Kata, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("from the host\n")
    script = "cat /v/given; echo back > /v/made; echo x > /in-the-layer; cat /in-the-layer"
    assert kata(*RUN, "--rm", "-v", f"{tmp_path}:/v", "busybox", "sh", "-c", script) == (0, "from the host\nx\n", "")
    assert (tmp_path / "made").read_text() == "back\n"


def test_what_the_guest_frees_goes_back_to_the_host(kata: Kata, box: str) -> None:
    before = guest_mib(kata, box)
    kata.ok("exec", box, "sh", "-c", "dd if=/dev/zero of=/load/x bs=1M count=200 2>/dev/null")
    assert guest_mib(kata, box) > before + 190
    kata.ok("exec", box, "rm", "/load/x")
    wait_for(lambda: guest_mib(kata, box) < before + 20, "the memory is given back")


def test_its_memory_has_a_limit(kata: Kata) -> None:
    """Of the kernel's process: who has taken it over takes memory beside the guest's."""
    name = kata.start("--accel", "uml", "-m", "64m", "busybox", "sleep", "1000")
    listed = kata.listed(name)
    groups = [group for each in host_hierarchies() for group in each.mount.glob(f"vc/kata_{name}")]
    if not any("memory" in each.controllers for each in host_hierarchies()):
        pytest.skip("no cgroup of this host can limit memory")
    (group,) = groups
    members = {int(line) for line in (group / "cgroup.procs").read_text().split()}
    assert listed["vmm_pid"] in members
    assert listed["supervisor_pid"] not in members
    (file,) = [path for path in (group / "memory.limit_in_bytes", group / "memory.max") if path.exists()]
    assert int(file.read_text()) == (2 * 256 + HOST_OVERHEAD_MIB) << 20
    kata.ok("delete", "--force", name)
    assert not group.exists()


def test_list_inspect_and_who_runs_it(kata: Kata, box: str) -> None:
    assert [row["accelerator"] for row in json.loads(kata.ok("list", "--json")) if row["name"] == box] == ["uml"]
    found = json.loads(kata.ok("inspect", "--json", box))
    hypervisor = found["hypervisor"]
    assert (hypervisor["name"], hypervisor["status"]) == ("User-mode Linux", "running")
    user = next(process["user"] for process in found["processes"] if process["role"] == "vmm")
    assert user >= 0x70000000, "a user of its own"


def test_more_than_one_vcpu_is_refused_with_the_reason(kata: Kata) -> None:
    done = kata(*RUN, "--rm", "--cpus", "2", "busybox", "true")
    assert done.code != 0
    assert "cannot use User-mode Linux: it has 1 vCPU at most, and 2 are asked for" in done.stderr


@pytest.fixture
def volume(kata: Kata, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Path and file of a direct volume of 48 MiB, on a file system with room for 20."""
    small, path = tmp_path / "small", tmp_path / "volume"
    small.mkdir()
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", small], check=True)
    try:
        backing = small / "disk"
        backing.touch()
        os.truncate(backing, 48 << 20)
        subprocess.run(["mkfs.ext4", "-q", backing], check=True)
        info = json.dumps({"volume-type": "block", "device": str(backing), "fstype": "ext4"})
        kata.ok("direct-volume", "add", "--volume-path", str(path), "--mount-info", info)
        yield path, backing
    finally:
        kata("direct-volume", "remove", "--volume-path", str(path))
        subprocess.run(["umount", small], check=True)


@pytest.mark.smoke  # the daemon of each release does something else at a resize
def test_a_direct_volume_grows_and_ends_the_sandbox_when_its_host_is_full(
    kata: Kata, volume: tuple[Path, Path]
) -> None:
    path, backing = volume
    name = kata.start("--accel", "uml", "-v", f"{path}:/data", "busybox", "sleep", "1000")
    script = "echo kept > /data/file; sync; grep -o '^/dev/vd[a-z] /data ext4' /proc/mounts"
    assert kata.ok("exec", name, "sh", "-c", script) == "/dev/vdb /data ext4\n"
    disk = next(one for one in json.loads(kata.ok("inspect", "--json", name))["devices"] if one["host"] == str(backing))
    assert disk["kind"] == "disk"
    os.truncate(backing, 64 << 20)
    kata.ok("direct-volume", "resize", "--volume-path", str(path), "--size", str(64 << 20))
    blocks = kata.ok("exec", name, "df", "-k", "/data").splitlines()[-1].split()[1]
    assert int(blocks) > 50 << 10, "the file system has grown, too"
    kata("exec", name, "dd", "if=/dev/zero", "of=/data/big", "bs=1M", "count=40", "conv=fsync")
    wait_until("it has ended", lambda: kata.listed(name)["state"] == "stopped")
    said = kata.listed(name)["error"]
    assert said == f"sandbox {name} was ended: the host cannot write {backing}: No space left on device"
    assert (
        kata(
            "run", "--rm", "--accel", "tcg", "--net", "none", "-v", f"{path}:/data", "busybox", "cat", "/data/file"
        ).stdout
        == "kept\n"
    )


@pytest.mark.parametrize("victim", ["kernel", "helper", "virtiofsd", "supervisor"])
def test_whoever_is_killed_nothing_stays(kata: Kata, victim: str) -> None:
    name = fresh_name("uml")
    with kata.spawn(
        *RUN, "--rm", "--name", name, *SHARED, "busybox", "sleep", "1000", stderr=subprocess.PIPE
    ) as running:
        wait_until("it runs", lambda: container_state(name) == "running")
        found = json.loads(kata.ok("inspect", "--json", name))
        of_role = {process["role"]: process["pid"] for process in reversed(found["processes"])}
        kernel = of_role["vmm"]
        helpers = [pid for pid in descendants(kernel) if pid != kernel]
        pid = {
            "kernel": kernel,
            "helper": helpers[0],
            "virtiofsd": of_role["virtiofsd"],
            "supervisor": running.pid,
        }[victim]
        os.kill(pid, signal.SIGKILL)
        if victim == "helper":  # the guest may live on
            os.kill(kernel, signal.SIGKILL)
        assert running.wait(180) != 0
    if victim == "supervisor":
        wait_until("its processes have ended", lambda: not processes_of(name))
        kata("delete", "--force", name)
    assert leftovers(name) == []


def metric(kata: Kata, box: str, name: str) -> float:
    (line,) = [line for line in kata.ok("metrics", box).splitlines() if line.startswith(f"{name} ")]
    return float(line.rpartition(" ")[2])


def memory_file_kib(kernel: int) -> int:
    """What the file of the guest's memory takes."""
    maps = Path(f"/proc/{kernel}/map_files")
    files = {os.stat(each) for each in maps.iterdir() if os.readlink(each).startswith("/tmp/")}
    (found,) = {each.st_blocks // 2 for each in files}
    return found


def program_kib(kernel: int) -> int:
    """Its share (PSS) of the kernel's program."""
    mapped = parse_smaps(Path(f"/proc/{kernel}/smaps").read_text())
    return sum(each.pss_kib for each in mapped if each.name == "/linux")


def shared_kib(pid: int) -> int:
    """What it has mapped of files in memory. Source: proc_pid_status(5)."""
    status = Path(f"/proc/{pid}/status").read_text()
    (found,) = [line.split()[1] for line in status.splitlines() if line.startswith("RssShmem:")]
    return int(found)


def test_what_it_takes_of_the_host(kata: Kata, box: str) -> None:
    """The guest's memory is a file that the kernel and its helpers map, so each page of it counts once."""
    kernel = kata.listed(box)["vmm_pid"]

    def measured() -> tuple[dict[str, int], list[int], int] | None:
        """None if another kernel has come or gone meanwhile, with which this one shares its program."""
        text_kib = program_kib(kernel)
        sizes = [memory_file_kib(kernel)]  # the guest goes on, and gives back what it frees
        (seen,) = json.loads(kata.ok("overhead", "--json", "--from", box))["observations"]
        sizes.append(memory_file_kib(kernel))
        return (seen["memory"], sizes, text_kib) if abs(program_kib(kernel) - text_kib) < 0.1 * text_kib else None

    memory, sizes, text_kib = wait_for(measured, "as many kernels before as after")
    guest = memory["guest_mapped_kib"] + memory["guest_unmapped_kib"]
    assert min(sizes) - 4096 < guest < max(sizes) + 4096
    assert memory["guest_mapped_kib"] > 0.5 * guest  # huge pages are taken whole, and mapped as far as they are used
    assert memory["translated_kib"] == 0
    assert memory["vmm_program_kib"] < 1.5 * text_kib, "a helper has all of the kernel's address space"
    assert 5 * 1024 < memory["supervisor_kib"] < 64 * 1024
    assert memory["virtiofsd_kib"] == 0, "nothing is shared"
    mapped = [shared_kib(kernel)]
    metered_kib = metric(kata, box, 'kata_hypervisor_proc_status{item="rssshmem"}') / 1024
    mapped.append(shared_kib(kernel))
    assert min(mapped) - 4096 < metered_kib < max(mapped) + 4096, "the metrics have it once, too"
    assert metric(kata, box, "kata_hypervisor_threads") >= 2
    roles = {one["role"] for one in json.loads(kata.ok("inspect", "--json", box))["processes"]}
    assert roles >= {"supervisor", "vmm", "vmm-helper"}
    assert (memory["disk_server_kib"] > 0) == ("storage" in roles), "image's disks are served where the host can"
