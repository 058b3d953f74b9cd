"""The root file system as a disk and by virtio-fs: the same to a container, and never the image itself."""

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.kata import RUN_PREFIX, Kata, wait_for
from kit.templates import templates_are_on

STORE = Path("/var/lib/katapod/images")


@pytest.fixture(params=["disk", "virtio-fs"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / "configuration.toml"
    factory = "" if templates_are_on() else "[factory]\nenable_template = false\n"
    path.write_text(f'{factory}[katapod]\nrootfs = "{request.param}"\n')
    return str(path)


@pytest.fixture
def image(kata: Kata, tmp_path: Path) -> Iterator[str]:
    """An image of its own, which no container has used yet: busybox, a user, and a file of his."""
    root, layout, name = tmp_path / "root", tmp_path / "layout", f"{RUN_PREFIX}rootfs"
    for folder in ("bin", "etc", "home/ann"):
        (root / folder).mkdir(parents=True)
    (root / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (root / "bin/busybox").chmod(0o755)
    for applet in ("cat", "dd", "df", "grep", "id", "ls", "mknod", "mount", "sh", "sleep", "stat", "sync", "touch"):
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nann:x:7:8::/home/ann:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nann:x:8:\n")
    (root / "home/ann/note").write_text("given\n")
    os.chown(root / "home/ann/note", 7, 8)
    (root / "home/ann/note").chmod(0o640)
    (root / "team").mkdir()
    os.chown(root / "team", 0, 2000)
    (root / "team").chmod(0o2775)

    def umoci(*args: str) -> None:
        subprocess.run(["umoci", *args], check=True, capture_output=True, timeout=180)

    umoci("init", "--layout", str(layout))
    umoci("new", "--image", f"{layout}:latest")
    umoci("insert", "--image", f"{layout}:latest", str(root), "/")
    imported = kata("image", "import", f"oci:{layout}:latest", name)
    assert imported.code == 0, imported
    yield name
    assert kata("image", "rm", name).code == 0


def place_of(kata: Kata, image: str) -> Path:
    images = json.loads(kata.ok("image", "ls", "--json"))
    (found,) = [item for item in images if f"{image}:latest" in item["names"]]
    return STORE / "images" / str(found["digest"]).removeprefix("sha256:")


def digest_of(path: Path) -> str:
    """Of the part of a file, which may be a large sparse disk, in which a small image lies."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(64 << 20)).hexdigest()


def content_of(place: Path) -> dict[str, str]:
    """All regular files of an image in the store, with their digests."""
    return {str(path): digest_of(path) for path in place.rglob("*") if path.is_file() and not path.is_symlink()}


def run(kata: Kata, config: str, *args: str) -> tuple[int, str, str]:
    return kata("--config", config, "run", "--rm", "--name", kata.name(), *args)


def test_default_is_a_disk(kata: Kata) -> None:
    assert kata.ok("run", "--rm", "--name", kata.name(), "busybox", "stat", "-f", "-c", "%T", "/") == "ext2/ext3\n"


def test_owners_users_and_free_room(kata: Kata, config: str, image: str) -> None:
    script = (
        "id -u; id -gn; cat note; stat -c '%u:%g %a' note; touch /team/of && stat -c '%u:%g' /team/of;"
        "touch mine && stat -c %u:%g mine; ls -d /lost+found"
    )
    who = ("-u", "ann", "--group-add", "2000")
    code, out, err = run(kata, config, *who, "-w", "/home/ann", image, "sh", "-c", script)
    assert out == "7\nann\ngiven\n7:8 640\n7:2000\n"  # the home directory is root's
    assert (code, err.count("Permission denied"), err.count("No such file")) == (1, 1, 1)
    assert run(kata, config, image, "sh", "-c", "dd if=/dev/zero of=/big bs=1M count=20 2> /big.log && ls -s /big") == (
        *(0, " 20480 /big\n", ""),
    )


def test_writes_stay_in_one_container(kata: Kata, config: str, image: str) -> None:
    script = "echo mine > /home/ann/note && rm -f /etc/group && mkdir /new && touch /new/file && sync"
    assert run(kata, config, image, "/bin/busybox", "sh", "-c", script)[0] == 0
    place = place_of(kata, image)
    before = content_of(place)
    assert run(kata, config, image, "/bin/busybox", "sh", "-c", script)[0] == 0
    assert run(kata, config, image, "sh", "-c", "cat /home/ann/note; ls -d /etc/group /new") == (
        *(1, "given\n/etc/group\n", "ls: /new: No such file or directory\n"),
    )
    assert content_of(place) == before


def test_two_at_once_share_an_image_and_no_file(kata: Kata, config: str, image: str) -> None:
    script = "echo $0 > /home/ann/note; touch /ready; sleep 1000"
    names = [kata.name(), kata.name()]
    try:
        for name in names:
            assert kata.ok("--config", config, "run", "-d", "--name", name, image, "sh", "-c", script, name)
        for name in names:
            seen = kata.ok("exec", name, "sh", "-c", "until [ -e /ready ]; do sleep 0.1; done; cat /home/ann/note")
            assert seen == f"{name}\n"
    finally:
        for name in names:
            assert kata("delete", "--force", name).code == 0


@pytest.mark.smoke
def test_read_only(kata: Kata, config: str, image: str, tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    flags = ("--read-only", "--tmpfs", "/scratch", "-v", f"{tmp_path}/volume:/volume")
    script = "cat /home/ann/note && touch /scratch/x /volume/y && touch /home/ann/z"
    assert run(kata, config, *flags, image, "sh", "-c", script) == (
        *(1, "given\n", "touch: /home/ann/z: Read-only file system\n"),
    )
    assert (tmp_path / "volume/y").exists()


def test_a_host_without_mke2fs_shares_the_files(kata: Kata, image: str, tmp_path: Path) -> None:
    """One warning that says what to install; the container runs, as it would with virtio-fs chosen."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for directory in ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"):
        for program in Path(directory).iterdir() if Path(directory).exists() else ():
            if program.name != "mke2fs" and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)
    with kata.spawn(
        *("run", "--rm", "--name", kata.name(), image, "stat", "-f", "-c", "%T", "/"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PATH": str(folder)},
    ) as running:
        out, err = running.communicate(timeout=180)
    assert (running.returncode, out) == (0, b"UNKNOWN\n")
    warnings = [line for line in err.decode().splitlines() if "WARNING: the root file system" in line]
    assert len(warnings) == 1
    assert "mke2fs" in warnings[0]
    assert "e2fsprogs" in warnings[0]
    assert not list(place_of(kata, image).glob("root-*"))


@pytest.mark.parametrize("config", ["virtio-fs"], indirect=True)
def test_a_tree_too_deep_to_recurse_stops_no_later_start(kata: Kata, config: str) -> None:
    """What a killed supervisor leaves is for the next start to remove, whatever the container has made of it."""
    name = kata.name()
    step = "/".join("d" * 50)
    script = f"for each in $(seq 23); do mkdir -p {step}; cd {step}; done; touch /made; sleep 1000"
    try:
        kata.ok("--config", config, "run", "-d", "--rm", "--name", name, "busybox", "sh", "-c", script)
        layers = Path(f"/var/lib/katapod/sandboxes/{name}/layers")
        wait_for((layers / name / "upper/made").exists, "the tree is made")
        os.kill(kata.listed(name)["supervisor_pid"], signal.SIGKILL)
        other = kata.run("busybox", "true")
        assert (other.code, other.stdout) == (0, "")
        assert "cannot" not in other.stderr
        assert not layers.exists()
        assert name not in kata.ok("list", "--quiet").split()
    finally:
        assert kata("delete", "--force", name).code == 0
    while any(path.name.startswith(f".{name}") for path in Path("/var/lib/katapod/sandboxes").iterdir()):
        assert kata.run("busybox", "true").code == 0  # a slow disk: more than one start takes its part of it


def test_paths_of_the_host_are_bytes(kata: Kata, tmp_path: Path) -> None:
    """A volume and a root file system whose names are no UTF-8: through the records to what shows them."""
    root, volume = tmp_path / "root-\udcff", tmp_path / "data-\udcff"
    for folder in (root / "bin", volume):
        folder.mkdir(parents=True)
    (root / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (root / "bin/busybox").chmod(0o755)
    (volume / "note").write_text("here\n")
    name = kata.name()
    kata.ok(
        *("run", "-d", "--name", name, "--net", "none", "-v", f"{volume}:/x", "--rootfs", str(root)),
        *("/bin/busybox", "sleep", "1000"),
    )
    assert kata.ok("exec", name, "/bin/busybox", "cat", "/x/note") == "here\n"
    assert f"{tmp_path}/root-\\xff" in kata.ok("list")
    (row,) = [row for row in json.loads(kata.ok("list", "--json")) if row["name"] == name]
    assert os.fsencode(row["image"]) == os.fsencode(root)
    assert "data-\\xff" in kata.ok("inspect", name)
    assert json.loads(kata.ok("inspect", "--json", name))["state"] == "running"
    kata.ok("delete", "--force", name)
