"""`-v`: what the host and a container see of the same files, and what neither can reach."""

import ast
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kit.kata import Kata, wait_for

NANOSECONDS = 1_234_567_890_123_456_789
SET_UID = 0o4751

DESCRIBE = """
import os, sys
found = {}
for name in sorted(os.listdir(sys.argv[1])):
    path = os.path.join(sys.argv[1], name)
    s = os.lstat(path)
    found[name] = {
        "mode": s.st_mode, "uid": s.st_uid, "gid": s.st_gid, "nlink": s.st_nlink, "size": s.st_size,
        "mtime": s.st_mtime_ns, "rdev": s.st_rdev,
        "target": os.readlink(path) if os.path.islink(path) else "",
        "xattrs": {k: os.getxattr(path, k, follow_symlinks=False).hex()
                   for k in os.listxattr(path, follow_symlinks=False) if k.startswith("user.")},
    }
print(ascii(found))
"""
POPULATE = """
import os, stat, sys
os.umask(0)
os.chdir(sys.argv[1])
with open("plain", "wb") as f:
    f.write(b"from the guest")
os.chown("plain", 4321, 8765)
os.chmod("plain", 0o2640)
os.setxattr("plain", "user.made", b"\\x00inside")
os.link("plain", "second name")
os.symlink("/only/in/the/container", "link")
os.lchown("link", 11, 12)
os.mkdir("folder", 0o1777)
os.mkfifo("pipe", 0o600)
os.utime("plain", ns=(1_234_567_890_123_456_789, 1_234_567_890_123_456_789))
"""


@dataclass(frozen=True, slots=True)
class Shared:
    """A running Debian container and the host's side of its volumes."""

    name: str
    rw: Path
    ro: Path
    file: Path
    ro_file: Path
    inner: Path
    secret: Path


@pytest.fixture(scope="module")
def box(module_kata: Kata, debian_rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    base = tmp_path_factory.mktemp("volumes")
    rw, ro, inner = base / "read write, ünïcödé 容器", base / "ro", base / "inner"
    for folder in (rw, ro, inner):
        folder.mkdir()
    (rw / "sub").mkdir()
    file, ro_file, secret = base / "single file.conf", base / "single-ro", base / "secret"
    for path, text in ((file, "one\n"), (ro_file, "two\n"), (secret, "the host's\n"), (ro / "data", "read me\n")):
        path.write_text(text)
    name = module_kata.start(
        *("--rootfs", str(debian_rootfs), "--group-add", "2000"),
        *("-v", f"{rw}:/mnt/an other näme", "-v", f"{inner}:/mnt/an other näme/sub", "-v", f"{ro}:/mnt/ro:ro"),
        *("-v", f"{file}:/etc/single.conf", "-v", f"{ro_file}:/etc/single-ro:ro"),
        *("sleep", "1000"),
    )
    return Shared(name, rw, ro, file, ro_file, inner, secret)


INSIDE = "/mnt/an other näme"


def _describe(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        status = path.lstat()
        names = [name for name in os.listxattr(path, follow_symlinks=False) if name.startswith("user.")]
        found[path.name] = {
            "mode": status.st_mode,
            "uid": status.st_uid,
            "gid": status.st_gid,
            "nlink": status.st_nlink,
            "size": status.st_size,
            "mtime": status.st_mtime_ns,
            "rdev": status.st_rdev,
            "target": str(path.readlink()) if path.is_symlink() else "",
            "xattrs": {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in names},
        }
    return found


def _make_folder(box: Shared, name: str) -> tuple[Path, str]:
    (box.rw / name).mkdir()
    return box.rw / name, f"{INSIDE}/{name}"


@pytest.mark.core
def test_host_sees_what_a_container_writes(kata: Kata, box: Shared) -> None:
    kata.ok("exec", box.name, "sh", "-c", f"echo written > '{INSIDE}/new file'; echo more >> /etc/single.conf")
    assert (box.rw / "new file").read_text() == "written\n"
    assert box.file.read_text() == "one\nmore\n"


@pytest.mark.core
def test_container_sees_what_the_host_changes(kata: Kata, box: Shared) -> None:
    changing = box.ro / "changing"
    changing.write_text("before\n")
    assert kata.ok("exec", box.name, "cat", "/mnt/ro/changing") == "before\n"
    changing.write_text("and after\n")
    os.rename(changing, box.ro / "renamed")
    wait_for(lambda: kata("exec", box.name, "cat", "/mnt/ro/renamed").stdout == "and after\n", "the change is seen")


def test_volume_inside_a_volume(kata: Kata, box: Shared) -> None:
    kata.ok("exec", box.name, "touch", f"{INSIDE}/sub/deep")
    assert (box.inner / "deep").exists()
    assert list((box.rw / "sub").iterdir()) == []


@pytest.mark.core
@pytest.mark.parametrize(
    "command",
    [
        "touch /mnt/ro/new",
        "echo x >> /mnt/ro/data",
        "rm /mnt/ro/data",
        "chmod 777 /mnt/ro/data",
        "echo x > /etc/single-ro",
    ],
)
def test_read_only(kata: Kata, box: Shared, command: str) -> None:
    result = kata("exec", box.name, "sh", "-c", command)
    assert result.code != 0
    assert "Read-only file system" in result.stderr
    assert (box.ro / "data").read_text() == "read me\n"
    assert stat.S_IMODE((box.ro / "data").stat().st_mode) == 0o644
    assert box.ro_file.read_text() == "two\n"


def test_read_only_is_the_hosts_to_decide(kata: Kata, box: Shared) -> None:
    """A container with all rights in its VM can mount as it likes; the host still refuses to write."""
    script = (
        "mount -o remount,bind,rw /mnt/ro; mount -o remount,rw /mnt/ro; grep ' /mnt/ro ' /proc/mounts; touch /mnt/ro/x"
    )
    result = kata("exec", "--privileged", box.name, "sh", "-c", script)
    assert " rw," in result.stdout, "the guest's own mount has become writable"
    assert result.code != 0
    assert "Read-only file system" in result.stderr
    assert not (box.ro / "x").exists()


def test_links_are_followed_inside_only(kata: Kata, box: Shared) -> None:
    folder, inside = _make_folder(box, "links")
    (folder / "shadow").symlink_to("/etc/shadow")
    (folder / "secret").symlink_to(box.secret)
    (folder / "up").symlink_to("../" * 30 + "etc/shadow")
    (folder / "ro").symlink_to("../../ro/data")
    own = kata.ok("exec", box.name, "cat", "/etc/shadow")
    assert own not in ("", Path("/etc/shadow").read_text())
    assert kata.ok("exec", box.name, "cat", f"{inside}/shadow") == own
    assert kata.ok("exec", box.name, "cat", f"{inside}/up") == own
    assert kata.ok("exec", box.name, "cat", f"{inside}/ro") == "read me\n"
    assert "No such file" in kata("exec", box.name, "cat", f"{inside}/secret").stderr


def test_container_cannot_write_out_through_a_link(kata: Kata, box: Shared) -> None:
    folder, inside = _make_folder(box, "out")
    script = f"ln -s '{box.secret}' '{inside}/x' && mkdir -p '{box.secret.parent}' && echo changed > '{inside}/x'"
    kata.ok("exec", box.name, "sh", "-c", script)
    assert box.secret.read_text() == "the host's\n"
    assert (folder / "x").is_symlink()
    assert kata.ok("exec", box.name, "cat", str(box.secret)) == "changed\n", "it went to the container's own file"


@pytest.mark.core
def test_attributes_from_the_host(kata: Kata, box: Shared) -> None:
    folder, inside = _make_folder(box, "from host")
    (folder / "plain").write_bytes(b"from the host")
    os.chown(folder / "plain", 1234, 5678)
    (folder / "plain").chmod(SET_UID)
    os.setxattr(folder / "plain", "user.key", b"\x00\xff value")
    os.link(folder / "plain", folder / "hard link")
    (folder / "soft").symlink_to("plain")
    (folder / "sticky").mkdir()
    (folder / "sticky").chmod(0o1777)
    os.mkfifo(folder / "fifo", 0o640)
    os.mknod(folder / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.utime(folder / "plain", ns=(NANOSECONDS, NANOSECONDS))
    expected = _describe(folder)
    assert expected["plain"]["mode"] == stat.S_IFREG | SET_UID
    assert ast.literal_eval(kata.ok("exec", box.name, "python3", "-c", DESCRIBE, inside)) == expected


def test_attributes_from_the_container(kata: Kata, box: Shared) -> None:
    folder, inside = _make_folder(box, "from guest")
    kata.ok("exec", box.name, "python3", "-c", POPULATE, inside)
    found = _describe(folder)
    assert sorted(found) == ["folder", "link", "pipe", "plain", "second name"]
    assert found["plain"] == {
        "mode": stat.S_IFREG | 0o2640,
        "uid": 4321,
        "gid": 8765,
        "nlink": 2,
        "size": 14,
        "rdev": 0,
        "mtime": NANOSECONDS,
        "target": "",
        "xattrs": {"user.made": b"\0inside".hex()},
    }
    assert found["second name"] == found["plain"]
    assert (folder / "second name").stat().st_ino == (folder / "plain").stat().st_ino
    assert (found["link"]["target"], found["link"]["uid"], found["link"]["gid"]) == ("/only/in/the/container", 11, 12)
    assert found["folder"]["mode"] == stat.S_IFDIR | 0o1777
    assert found["pipe"]["mode"] == stat.S_IFIFO | 0o600
    assert abs(found["pipe"]["mtime"] - time.time_ns()) < 60e9, "guest and host agree on the time"


def test_owner_counts(kata: Kata, box: Shared) -> None:
    """A user of the container has that user's rights on the host's files."""
    folder, inside = _make_folder(box, "owned")
    folder.chmod(0o711)
    (folder / "mine").write_text("1000's\n")
    (folder / "roots").write_text("root's\n")
    for name, uid, mode in (("mine", 1000, 0o600), ("roots", 0, 0o600)):
        os.chown(folder / name, uid, uid)
        (folder / name).chmod(mode)
    assert kata.ok("exec", "-u", "1000:1000", box.name, "cat", f"{inside}/mine") == "1000's\n"
    assert "Permission denied" in kata("exec", "-u", "1000:1000", box.name, "cat", f"{inside}/roots").stderr
    assert "Permission denied" in kata("exec", "-u", "1000:1000", box.name, "touch", f"{inside}/new").stderr


def _owners(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.lstat().st_uid, path.lstat().st_gid) for path in folder.iterdir()}


def test_groups_count(kata: Kata, box: Shared) -> None:
    """What a supplementary group may it can, and no more; files belong to who made them, and in a set-group-ID
    directory to its group. Who is not in that group gets no set-group-ID program there (CVE-2018-13405)."""
    folder, inside = _make_folder(box, "groups")
    for name, group, mode in (
        ("team", 2000, 0o2775),
        ("plain", 2000, 0o775),
        ("closed", 2000, 0o2755),
        ("other", 3000, 0o2777),
    ):
        (folder / name).mkdir()
        os.chown(folder / name, 0, group)
        (folder / name).chmod(mode)
    make = "echo mine > f; mkdir d; ln -s f l; mkfifo p; ln f h; chmod 2755 f; chgrp 2000 d"
    for name in ("team", "plain"):
        kata.ok("exec", "-u", "1000:1000", "-w", f"{inside}/{name}", box.name, "sh", "-c", make)
    made = {name: _owners(folder / name) for name in ("team", "plain")}
    assert made["team"] == dict.fromkeys("fdlph", (1000, 2000))
    assert made["plain"] == dict.fromkeys("flph", (1000, 1000)) | {"d": (1000, 2000)}
    assert stat.S_IMODE((folder / "team/f").stat().st_mode) == 0o2755
    assert stat.S_IMODE((folder / "team/d").stat().st_mode) == 0o2755
    assert stat.S_IMODE((folder / "plain/d").stat().st_mode) == 0o755
    kata.ok("exec", "-u", "1000:1000", box.name, "sh", "-c", f"echo more >> '{inside}/team/f'")
    assert stat.S_IMODE((folder / "team/f").stat().st_mode) == 0o755, "a write takes set-group-ID away"
    script = "import os, sys; os.close(os.open(sys.argv[1], os.O_CREAT, 0o2755))"
    kata.ok("exec", "-u", "1000:1000", box.name, "python3", "-c", script, f"{inside}/other/x")
    status = (folder / "other/x").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1000, 3000, 0o755)
    for command, said in (
        (f"touch '{inside}/closed/x'", "Permission denied"),
        (f"chown 0 '{inside}/team/f'", "not permitted"),
        (f"chgrp 3000 '{inside}/team/f'", "not permitted"),
    ):
        assert said in kata("exec", "-u", "1000:1000", box.name, "sh", "-c", command).stderr
    assert list((folder / "closed").iterdir()) == []


def test_root_file_system_is_thrown_away(kata: Kata, box: Shared, debian_rootfs: Path) -> None:
    kata.ok("exec", box.name, "sh", "-c", "echo changed > /etc/issue; touch /new; rm /etc/debian_version")
    assert kata.ok("exec", box.name, "cat", "/etc/issue") == "changed\n"
    assert not (debian_rootfs / "new").exists()
    assert (debian_rootfs / "etc/debian_version").exists()
    assert (debian_rootfs / "etc/issue").read_text() != "changed\n"
