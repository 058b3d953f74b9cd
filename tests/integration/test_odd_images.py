"""Images that builders other than the usual ones leave behind: what the engines run is run."""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from images_helper import Layout, directory, file, layer, node
from vm_helper import needs_vm

from kit.kata import RUN_PREFIX, Kata

pytestmark = [*needs_vm, pytest.mark.usefixtures("guest_image", "leaves_nothing")]

BUSYBOX = Path("/bin/busybox").read_bytes()
NAME = f"{RUN_PREFIX}odd:1"
CONFIG: dict[str, Any] = {
    "User": "bob:",
    "WorkingDir": "srv",
    "StopSignal": "SIGNOPE",
    "Env": ["PATH=/bin", "NO_VALUE", "=nameless", "KEPT=a=b"],
    "Cmd": ["sh", "-c", "id; pwd; env; ls -ld /etc/hostname; cat /etc/hosts; readlink /etc/resolv.conf"],
    "Labels": {"k": None},
    "Volumes": None,
    "ExposedPorts": {"80": {}, "x/y/z": None},
}


@pytest.fixture
def odd_image(kata: Kata, tmp_path: Path) -> Iterator[str]:
    layout = Layout(tmp_path / "layout")
    content = layer(
        *(directory(name) for name in ("bin", "etc", "etc/hostname", "srv", "proc", "dev", "sys")),
        file("bin/busybox", BUSYBOX, 0o755),
        *(node(f"bin/{name}", tarfile.SYMTYPE, "busybox") for name in ("sh", "id", "env", "ls", "cat", "readlink")),
        file("etc/passwd", b"root:x:0:0\nbob:x:1000:1001\n"),
        file("etc/group", b"root:x:0\nteam:x:1001\nmore:x:1002:bob\n"),
        node("etc/hosts", tarfile.SYMTYPE, "../run/hosts"),
        node("etc/resolv.conf", tarfile.SYMTYPE, "/run/systemd/resolve/stub-resolv.conf"),
    )
    layout.add("t", content, config=CONFIG)
    kata.ok("image", "import", layout.ref("t"), NAME)
    yield NAME
    kata.ok("image", "rm", NAME)


def test_it_runs_as_the_engines_run_it(kata: Kata, odd_image: str) -> None:
    code, out, err = kata.run(odd_image)
    assert code == 0, err
    lines = out.splitlines()
    assert re.fullmatch(r"uid=1000\S* gid=1001\S* groups=(1001\S*,)?1002\(more\)", lines[0])
    assert lines[1] == "/srv"
    assert "KEPT=a=b" in lines
    assert not {line for line in lines if line.startswith(("NO_VALUE", "=nameless"))}
    assert any(line.startswith("drwxr-xr-x") and line.endswith("/etc/hostname") for line in lines), out
    assert any("localhost" in line for line in lines), out
    assert lines[-1] == "/run/systemd/resolve/stub-resolv.conf"
    assert "the image's StopSignal 'SIGNOPE' is not a signal" in err
    assert "--signal" not in err
    assert "the image's /etc/hostname is a directory" in err


def test_no_room_for_shared_memory_is_the_default(kata: Kata) -> None:
    """A tmpfs takes 0 for no limit."""
    out = kata.run("--shm-size", "0", "busybox", "sh", "-c", "grep /dev/shm /proc/mounts").stdout
    assert "size=65536k" in out
