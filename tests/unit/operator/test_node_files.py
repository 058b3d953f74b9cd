"""Files of a node: the payload, and replacing what is there. The node's root is a directory of the test's."""

import os
import stat
from pathlib import Path

import pytest

from katapod.operator.node import payload
from katapod.operator.node.errors import NodeError
from katapod.operator.node.host import Host
from katapod.operator.node.payload import copy_images, install_payload, payloads, remove_payload, users_of


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    for folder in ("usr/bin", "boot", "etc/alternatives"):
        (root / folder).mkdir(parents=True)
    (root / "bin").symlink_to("usr/bin")
    for program in ("kata-runtime", "busybox"):
        (root / "usr/bin" / program).write_text(program)
        (root / "usr/bin" / program).chmod(0o755)
    (root / "usr/bin/link").symlink_to("/elsewhere")
    return root


@pytest.fixture
def host(tmp_path: Path) -> Host:
    (tmp_path / "node").mkdir()
    return Host(tmp_path / "node")


def test_a_payload_is_there_whole_or_not_at_all(host: Host, source: Path) -> None:
    assert install_payload(host, source, "1")
    home = host.root / "opt/katapod/1"
    assert os.readlink(home / "rootfs/usr/bin/link") == "/elsewhere"
    starter = home / "bin/containerd-shim-kata-v2"
    assert starter.read_text().startswith("#!/opt/katapod/1/bin/busybox sh\n")
    assert starter.stat().st_mode & stat.S_IXUSR
    assert not install_payload(host, source, "1"), "it was there"
    assert install_payload(host, source, "2")
    assert payloads(host) == ["1", "2"]
    remove_payload(host, "1")
    remove_payload(host, "1")
    assert payloads(host) == ["2"]


def test_a_copy_that_fails_leaves_nothing(host: Host, source: Path) -> None:
    (source / "etc/alternatives").rmdir()  # the last to be copied
    with pytest.raises(NodeError, match="cannot write /opt/katapod/1"):
        install_payload(host, source, "1")
    assert payloads(host) == []


def test_what_is_no_payload_is_said(host: Host, tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="holds no payload"):
        install_payload(host, tmp_path, "1")


def test_a_full_disk_is_seen_before_it_is_full(host: Host, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "ROOM", 1e12)
    with pytest.raises(NodeError, match="MiB free"):
        install_payload(host, source, "1")
    assert payloads(host) == []


def test_nobody_uses_a_payload_that_is_not_mounted() -> None:
    assert users_of("no-such-target") == []


def test_a_replaced_file_keeps_its_mode(host: Host) -> None:
    file = host.root / "etc/engine.toml"
    file.parent.mkdir()
    file.write_text("old")
    file.chmod(0o640)
    host.write("/etc/engine.toml", "new")
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("new", 0o640)
    assert os.listdir(file.parent) == ["engine.toml"]
    host.write("/etc/engine.toml", None)
    assert host.read("/etc/engine.toml") is None


def test_removal_leaves_a_directory_that_was_there(host: Host) -> None:
    folder = host.root / "var/lib/katapod"
    (folder / "deep/er").mkdir(parents=True)
    (folder / "link").symlink_to(host.root)
    host.remove("/var/lib/katapod", itself=False)
    assert os.listdir(folder) == []
    host.remove("/var/lib/katapod")
    host.remove("/var/lib/katapod")
    assert not folder.exists()


def test_a_program_that_fails_is_named_with_what_it_said() -> None:
    with pytest.raises(NodeError, match="ended with 3: oh no"):
        Host(Path("/")).run("sh", "-c", "echo oh no >&2; exit 3")
    with pytest.raises(NodeError, match="cannot run /no/such"):
        Host(Path("/")).run("/no/such")


def test_guest_images_come_along_unless_the_node_has_some(host: Host, source: Path) -> None:
    built = source / "var/cache/kata-containers"
    (built / "osbuilder-images/6.1").mkdir(parents=True)
    (built / "osbuilder-images/6.1/kernel").write_text("k")
    (built / "vmlinuz.container").symlink_to("osbuilder-images/6.1/kernel")
    target = host.root / "var/cache/kata-containers"
    copy_images(host, source)
    assert (target / "vmlinuz.container").read_text() == "k"
    (built / "osbuilder-images/6.1/kernel").write_text("other")
    copy_images(host, source)
    assert (target / "vmlinuz.container").read_text() == "k"
    assert sorted(os.listdir(target)) == ["osbuilder-images", "vmlinuz.container"]
