"""What the contestants run: bundles, the image, the order of kernel modules, the sum of a process's pages."""

import hashlib
import json
import tarfile
from pathlib import Path

from bench.by_hand import module_files
from bench.measure import Outcome
from bench.memory import descendants, parse_pss_mib, part_of
from bench.programs import PROGRAMS_SCRIPT, program_readings, programs
from bench.workload import Bundles, write_archive

DEP = """\
kernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio.ko:
kernel/fs/fuse/fuse.ko:
kernel/fs/fuse/virtiofs.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko kernel/fs/fuse/fuse.ko
kernel/drivers/virtio/virtio-pci.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
"""


def test_a_bundle_for_each_command(tmp_path: Path) -> None:
    bundles = Bundles(tmp_path, tmp_path / "rootfs")
    one, other = bundles.bundle(("echo", "a b")), bundles.bundle(("echo", "a", "b"))
    assert one != other
    assert bundles.bundle(("echo", "a b")) == one
    spec = json.loads((one / "config.json").read_text())
    assert (spec["process"]["args"], spec["root"]["path"]) == (["echo", "a b"], str(tmp_path / "rootfs"))


def test_the_archive_is_an_image(tmp_path: Path) -> None:
    (tmp_path / "rootfs" / "bin").mkdir(parents=True)
    (tmp_path / "rootfs" / "bin" / "tool").write_text("tool")
    write_archive(tmp_path / "rootfs", tmp_path / "image.tar")
    with tarfile.open(tmp_path / "image.tar") as tar:
        (manifest,) = json.loads(tar.extractfile("manifest.json").read())  # type: ignore[union-attr]
        config = json.loads(tar.extractfile(manifest["Config"]).read())  # type: ignore[union-attr]
        (layer,) = manifest["Layers"]
        digest = hashlib.sha256(tar.extractfile(layer).read()).hexdigest()  # type: ignore[union-attr]
        with tarfile.open(fileobj=tar.extractfile(layer)) as inner:
            assert "./bin/tool" in inner.getnames()
    assert config["rootfs"]["diff_ids"] == [f"sha256:{digest}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.tar", "rootfs"]


def test_modules_come_after_what_they_need_and_once() -> None:
    names = [Path(path).name for path in module_files(("virtio_pci", "virtiofs"), DEP)]
    assert sorted(names) == ["fuse.ko", "virtio-pci.ko", "virtio.ko", "virtio_ring.ko", "virtiofs.ko"]
    assert names.index("virtio.ko") < names.index("virtio_ring.ko") < names.index("virtio-pci.ko")
    assert names.index("fuse.ko") < names.index("virtiofs.ko")


def test_pss_is_one_line_of_many() -> None:
    assert parse_pss_mib("Rss:  9999 kB\nPss:  2048 kB\nPss_Dirty:  1024 kB\n") == 2.0
    assert parse_pss_mib("") == 0.0


def test_descendants_of_several_roots() -> None:
    parent_of = {2: 1, 3: 2, 4: 3, 5: 1, 6: 5, 7: 1}
    assert descendants({2, 6}, parent_of) == {2, 3, 4, 6}


def test_processes_belong_to_parts() -> None:
    programs = (
        "qemu-system-x86_64",
        "/usr/lib/qemu/virtiofsd",
        "qemu-storage-daemon",
        "linux.uml /run/vc/vm/qemu-system",
    )
    assert [part_of(each) for each in programs] == ["QEMU", "virtiofsd", "qemu-storage-daemon", "User-mode Linux"]
    assert part_of("qemu-storage-daemon /run/vc/vm/a1") == "qemu-storage-daemon", "as the jail names it"
    assert part_of("/usr/bin/python3") == part_of("") == "kata-runtime"


def test_each_program_is_timed_from_the_end_of_the_one_before() -> None:
    names = list(programs("base", ("one",)))
    assert [line for line in PROGRAMS_SCRIPT.splitlines() if line.startswith("echo '")] == [
        f"echo '{name}'" for name in names
    ]
    lines = [(2.0, "begin")] + [(2.0 + 1.5 * number, name) for number, name in enumerate(names, 1)]
    assert list(program_readings(Outcome(["x"], 0.0, lines))) == [(name, 1.5) for name in names]
