"""Volumes of pods as the kubelet prepares them on the host: folders, files, tmpfs, links that are swapped."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.containerd import Containerd
from kit.cri import Cri, CriError, Pod, mount
from kit.kata import Kata, wait_for

SLEEP = ("sleep", "100000")
HOST_TO_CONTAINER = 1
LIBRARIES = "/tools/lib/x86_64-linux-gnu"
HOST_FLOCK = (f"{LIBRARIES}/ld-linux-x86-64.so.2", "--library-path", LIBRARIES, "/tools/bin/flock")
"""The host's, with /usr mounted at /tools: busybox has none."""


@pytest.fixture
def memory_volume(tmp_path: Path) -> Iterator[Path]:
    """An emptyDir of medium Memory with a size limit: the kubelet mounts a tmpfs."""
    folder = tmp_path / "memory"
    folder.mkdir()
    with mounted_tmpfs(folder, "size=4m"):
        yield folder


@contextlib.contextmanager
def mounted_tmpfs(folder: Path, options: str = "rw") -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def host_folder(tmp_path: Path) -> Iterator[Path]:
    """A directory whose mounts are shared, as systemd makes all of a host: an unmount reaches who has a copy."""
    folder = tmp_path / "host"
    folder.mkdir()
    with mounted_tmpfs(folder):
        subprocess.run(["mount", "--make-shared", folder], check=True)
        yield folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    """A block device with an ext4 file system of 64 MiB."""
    backing = tmp_path / "backing"
    backing.touch()
    os.truncate(backing, 64 << 20)
    subprocess.run(["mkfs.ext4", "-q", backing], check=True)
    command = ["losetup", "--find", "--show", str(backing)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.qemu("direct volumes")
def test_direct_volume(cri: Cri, kata: Kata, disk: str, tmp_path: Path) -> None:
    """The guest mounts the device itself, for all containers of one pod, and for no other pod."""
    volume = tmp_path / "volume"
    volume.mkdir()
    where = ("--volume-path", str(volume))
    info = {"volume-type": "block", "device": disk, "fstype": "ext4", "metadata": {"fsGroup": "4242"}}

    def announce(**changes: str) -> None:
        kata.ok("direct-volume", "add", *where, "--mount-info", json.dumps(info | changes))

    announce(device="/no/such/disk")
    try:
        assert "cannot find a sandbox that uses" in kata("direct-volume", "stats", *where).stderr
        pod, mounts = cri.run_pod(), [mount(volume, "/data")]
        for changes, said in (({}, "/no/such/disk of the direct volume"), ({"fstype": "xfs"}, "cannot mount blk")):
            if changes:
                announce(**changes)
            with pytest.raises(CriError, match=said):
                pod.start(*SLEEP, mounts=mounts)
        announce()
        one, two = pod.start(*SLEEP, name="one", mounts=mounts), pod.start(*SLEEP, name="two", mounts=mounts)
        assert re.search(r"^/dev/vd\S+ on /data type ext4 \(rw", pod.sh(one, "mount"), re.MULTILINE)
        pod.sh(one, "echo inside > /data/file")
        assert pod.sh(two, "cat /data/file; stat -c %g /data/file") == "inside\n4242\n"
        usage = json.loads(kata.ok("direct-volume", "stats", *where))["usage"]
        assert 48 << 20 < usage[0]["total"] < 64 << 20
        larger = ("direct-volume", "resize", *where, "--size", str(96 << 20))
        assert f"{disk} has {64 << 20}" in kata(*larger).stderr
        os.truncate(tmp_path / "backing", 96 << 20)
        subprocess.run(["losetup", "--set-capacity", disk], check=True)
        kata.ok(*larger)
        usage = json.loads(kata.ok("direct-volume", "stats", *where))["usage"]
        assert 80 << 20 < usage[0]["total"] < 96 << 20
        assert "it cannot shrink" in kata("direct-volume", "resize", *where, "--size", "4096").stderr
        other = cri.run_pod()
        with pytest.raises(CriError, match=f"cannot use the direct volume .*: sandbox {pod.id} has it"):
            other.start(*SLEEP, mounts=mounts)
        pod.remove_container(one)
        assert pod.sh(two, "cat /data/file") == "inside\n"
        pod.remove_container(two)
        again = other.start(*SLEEP, mounts=mounts)
        assert other.sh(again, "cat /data/file") == "inside\n"
        other.stop_and_remove()
        assert list(volume.iterdir()) == []
        assert "cannot find a sandbox that uses" in kata("direct-volume", "stats", *where).stderr
    finally:
        kata.ok("direct-volume", "remove", *where)
    assert "cannot find the direct volume" in kata("direct-volume", "stats", *where).stderr


@pytest.mark.reference
def test_host_path(pod: Pod, tmp_path: Path) -> None:
    """Both ways, with owner and mode, while the container runs."""
    (tmp_path / "before").write_text("from the host\n")
    container = pod.start(*SLEEP, mounts=[mount(tmp_path, "/mnt/data")])
    assert pod.sh(container, "cat /mnt/data/before") == "from the host\n"
    pod.sh(container, "echo inside > /mnt/data/inside; chown 1000:1000 /mnt/data/inside; chmod 640 /mnt/data/inside")
    info = (tmp_path / "inside").stat()
    assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (1000, 1000, 0o640)
    (tmp_path / "later").write_text("later\n")
    wait_for(lambda: pod.exec(container, "cat", "/mnt/data/later").stdout == "later\n", "a new file is seen")


@pytest.mark.reference
def test_read_only(pod: Pod, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept\n")
    container = pod.start(*SLEEP, mounts=[mount(tmp_path, "/mnt", readonly=True)])
    assert pod.sh(container, "cat /mnt/file") == "kept\n"
    result = pod.exec(container, "sh", "-c", "echo changed > /mnt/file")
    assert result.code != 0
    assert "Read-only file system" in result.stderr
    assert (tmp_path / "file").read_text() == "kept\n"


@pytest.mark.reference
def test_fs_group(pod: Pod, tmp_path: Path) -> None:
    """A volume as the kubelet gives it to a pod with fsGroup 2000."""
    volume, closed = tmp_path / "volume", tmp_path / "closed"
    for folder, mode in ((volume, 0o2775), (closed, 0o2755)):
        folder.mkdir()
        os.chown(folder, 0, 2000)
        folder.chmod(mode)
    user = {"run_as_user": {"value": 1000}, "run_as_group": {"value": 1000}, "supplemental_groups": [2000]}
    mounts = [mount(volume, "/data"), mount(closed, "/closed")]
    container = pod.start(*SLEEP, mounts=mounts, linux={"security_context": user})
    pod.sh(container, "umask 002; echo x > /data/file; mkdir /data/folder; touch /data/folder/file")
    found = {path: (volume / path).stat() for path in ("file", "folder", "folder/file")}
    assert {(status.st_uid, status.st_gid) for status in found.values()} == {(1000, 2000)}
    assert [oct(status.st_mode & 0o7777) for status in found.values()] == ["0o664", "0o2775", "0o664"]
    assert "Permission denied" in pod.exec(container, "touch", "/closed/file").stderr
    assert list(closed.iterdir()) == []


@pytest.mark.reference
def test_read_only_is_not_recursive(cri: Cri, tmp_path: Path, memory_volume: Path) -> None:
    """What is mounted below a read-only volume stays as it is on the host: writable, also two levels down."""
    for folder in (memory_volume / "disk", memory_volume / "kept"):
        folder.mkdir()
    with mounted_tmpfs(memory_volume / "disk"), mounted_tmpfs(memory_volume / "kept", "ro"):
        pod = cri.run_pod()
        container = pod.start(*SLEEP, mounts=[mount(tmp_path, "/mnt", readonly=True)])
        for below, writable in (("", False), ("/memory", True), ("/memory/disk", True), ("/memory/kept", False)):
            result = pod.exec(container, "touch", f"/mnt{below}/new")
            assert (result.code == 0) == writable, result
            assert ("Read-only file system" in result.stderr) != writable
        assert (memory_volume / "disk/new").exists()
        pod.stop_and_remove()


def test_shared_by_two_containers(pod: Pod, tmp_path: Path) -> None:
    """An emptyDir: what one writes the other reads."""
    writer = pod.start(*SLEEP, name="writer", mounts=[mount(tmp_path, "/out")])
    reader = pod.start(*SLEEP, name="reader", mounts=[mount(tmp_path, "/in", readonly=True)])
    pod.sh(writer, "echo word > /out/file")
    wait_for(lambda: pod.exec(reader, "cat", "/in/file").stdout == "word\n", "the other one reads it")


@pytest.mark.reference
def test_locks_hold_within_a_pod(cri: Cri, disk: str, host_folder: Path) -> None:
    """Of two containers with one volume at different places: it is one file system to them, until both have gone."""
    folder = host_folder / "volume"
    folder.mkdir()
    subprocess.run(["mount", disk, folder], check=True)
    try:
        pod, tools = cri.run_pod(), mount(Path("/usr"), "/tools", readonly=True)
        holder = (*HOST_FLOCK, "/data/lock", "sh", "-c", "touch /data/held; sleep 100000")
        one = pod.start(*holder, name="one", mounts=[mount(folder, "/data"), tools])
        two = pod.start(*SLEEP, name="two", mounts=[mount(folder, "/other"), tools])
        wait_for((folder / "held").exists, "the lock is held")
        assert pod.sh(one, "stat -c '%d %i' /data/lock") == pod.sh(two, "stat -c '%d %i' /other/lock")
        assert pod.exec(two, *HOST_FLOCK, "-n", "/other/lock", "true").code == 1
        assert pod.exec(two, *HOST_FLOCK, "-n", "/other/another", "true").code == 0
        pod.remove_container(one)
        pod.sh(two, f"{shlex.join(HOST_FLOCK)} -n /other/lock touch /other/freed")
        assert (folder / "freed").exists()
        pod.remove_container(two)
    finally:
        subprocess.run(["umount", folder], check=True)
    kept = Path("/sys/fs/ext4") / Path(disk).name
    wait_for(lambda: not kept.exists(), "nothing in the pod, which goes on, holds the file system")


def test_memory_volume_has_its_limit(pod: Pod, memory_volume: Path) -> None:
    container = pod.start(*SLEEP, mounts=[mount(memory_volume, "/memory")])
    pod.sh(container, "head -c 1000000 /dev/zero > /memory/fits; sync")
    result = pod.exec(container, "sh", "-c", "head -c 8000000 /dev/zero > /memory/too-much")
    assert result.code != 0
    assert "No space left" in result.stderr or "I/O error" in result.stderr  # the latter for a write that fits in part
    assert pod.sh(container, "wc -c < /memory/fits").strip() == "1000000"


def test_shared_memory_is_the_guests(pod: Pod, memory_volume: Path) -> None:
    """One for all containers of the pod, in the guest's memory; a volume in its place is that volume."""
    writer = pod.start(*SLEEP, name="writer")
    reader = pod.start(*SLEEP, name="reader")
    volume = pod.start(*SLEEP, name="volume", mounts=[mount(memory_volume, "/dev/shm")])
    kinds = [pod.sh(each, "grep ' /dev/shm ' /proc/mounts").split()[2] for each in (writer, reader)]
    assert kinds == ["tmpfs", "tmpfs"]
    pod.sh(writer, "echo word > /dev/shm/file")
    assert pod.sh(reader, "cat /dev/shm/file; df -k /dev/shm | tail -n 1").split()[:3] == ["word", "shm", "65536"]
    pod.sh(volume, "test ! -e /dev/shm/file && echo there > /dev/shm/file")
    assert (memory_volume / "file").read_text() == "there\n"


@pytest.mark.reference
def test_single_file(pod: Pod, tmp_path: Path) -> None:
    """As subPath and the termination message are mounted: one file, written in place."""
    message = tmp_path / "termination-log"
    message.touch()
    container = pod.start(
        "sh", "-c", "echo reason > /dev/termination-log; exit 2", mounts=[mount(message, "/dev/termination-log")]
    )
    assert pod.wait_exit(container) == 2
    assert message.read_text() == "reason\n"


def test_file_over_a_file_of_the_image(pod: Pod, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("10.0.0.1 somewhere\n")
    container = pod.start(*SLEEP, mounts=[mount(hosts, "/etc/hosts"), mount(hosts, "/etc/passwd", readonly=True)])
    assert pod.sh(container, "cat /etc/hosts /etc/passwd") == "10.0.0.1 somewhere\n" * 2
    hosts.write_text("10.0.0.2 elsewhere\n")
    wait_for(lambda: "elsewhere" in pod.sh(container, "cat /etc/hosts"), "the change is seen")


def write_config(folder: Path, number: int, text: str) -> Path | None:
    """As the kubelet writes a ConfigMap: a new folder, then the link ..data is swapped in one step. Returns the old
    folder, for the caller to remove."""
    fresh = folder / f"..2026_11_0{number}"
    fresh.mkdir()
    (fresh / "key").write_text(text)
    (folder / "..data_tmp").symlink_to(fresh.name)
    old = os.readlink(folder / "..data") if (folder / "..data").is_symlink() else None
    os.rename(folder / "..data_tmp", folder / "..data")
    if old is None:
        (folder / "key").symlink_to("..data/key")
        return None
    return folder / old


@pytest.mark.reference
def test_config_map_is_updated(pod: Pod, tmp_path: Path) -> None:
    """Atomically: a reader sees the old text or the new one, and never none. A guest knows a name for a second, so it
    may look for the old folder once more after the swap: here that is removed when the new text has been seen."""
    write_config(tmp_path, 1, "first\n")
    reading = "while :; do cat /etc/config/key > /tmp/now 2>/dev/null || echo missing >> /tmp/holes; sleep 0.02; done"
    container = pod.start("sh", "-c", reading, mounts=[mount(tmp_path, "/etc/config", readonly=True)])
    for number, text in ((2, "second\n"), (3, "third\n")):
        old = write_config(tmp_path, number, text)
        wait_for(lambda text=text: pod.sh(container, "cat /etc/config/key") == text, f"{text!r} is seen")
        assert old is not None
        shutil.rmtree(old)
    assert pod.exec(container, "test", "-e", "/tmp/holes").code == 1


def test_many_volumes(pod: Pod, tmp_path: Path) -> None:
    """A projected volume and a dozen more in one container."""
    mounts = []
    for number in range(12):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "name").write_text(f"{number}\n")
        mounts.append(mount(tmp_path / str(number), f"/volumes/{number}", readonly=number % 2 == 0))
    container = pod.start(*SLEEP, mounts=mounts)
    assert pod.sh(container, "for n in 0 1 2 3 4 5 6 7 8 9 10 11; do cat /volumes/$n/name; done").split() == [
        str(number) for number in range(12)
    ]


def test_links_stay_inside(pod: Pod, tmp_path: Path) -> None:
    """A link in a volume leads to the container's own files."""
    (tmp_path / "link").symlink_to("/etc/passwd")
    container = pod.start(*SLEEP, mounts=[mount(tmp_path, "/mnt")])
    assert pod.sh(container, "cat /mnt/link") == pod.sh(container, "cat /etc/passwd")
    assert "user:x:1000" in pod.sh(container, "cat /mnt/link")


def test_what_a_pod_mounts_pins_nothing_of_others(cri: Cri, node: Containerd) -> None:
    """A hostPath `/` has the mounts of every other pod below it: they can be removed all the same, and the host's mount
    namespace has nothing of ours, during and after."""

    def of_host(word: str) -> list[str]:
        return [line for line in Path("/proc/1/mountinfo").read_text().splitlines() if word in line]

    reference = Cri(node, "runc")
    try:
        other = reference.run_pod()
        container = other.start(*SLEEP)
        (root,) = [line.split()[4] for line in of_host(container) if line.split()[4].endswith("/rootfs")]
        pod = cri.run_pod()
        looking = pod.start(*SLEEP, mounts=[mount("/", "/host")])
        assert "busybox" in pod.sh(looking, f"ls /host{root}/bin"), "it has them below its own"
        share = f"kata-containers/shared/sandboxes/{pod.id}"  # and not those of other tests, which run beside this one
        assert of_host(share) == []
        assert of_host(looking) == []
        other.remove_container(container)  # EBUSY, while they were mounted in the host's namespace a second time
        other.stop_and_remove()
        assert of_host(container) == []
        pod.remove_container(looking)
        pod.stop_and_remove()
        assert of_host(share) == []
    finally:
        reference.remove_all()
        reference.close()
