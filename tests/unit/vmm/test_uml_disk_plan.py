"""How the disks of User-mode Linux are served."""

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from katapod.plan.jail import Access
from katapod.vmm.devices import Disk, DiskSettings
from katapod.vmm.errors import VmmRefused
from katapod.vmm.processes import is_vm
from katapod.vmm.uml.disks import (
    DISKS_MAX,
    FIRST_SLOT,
    DiskServerPlan,
    disk_node,
    disk_options,
    disk_socket,
    guest_path,
)

DAEMON = Path("/usr/bin/qemu-storage-daemon")
ROOT = Disk("root-1", Path("/sandbox/root.qcow2"), FIRST_SLOT, base=Path("/images/root.ext4"))
DATA = Disk("data", Path("/srv/data.img"), FIRST_SLOT + 1)
DEVICE = Disk("dev", Path("/dev/sdx"), FIRST_SLOT + 2, read_only=True, host_device=True)


def words_of(disk: Disk) -> tuple[dict[str, Any], dict[str, Any]]:
    """Node and export."""
    monitor, node, export = (DiskServerPlan(DAEMON, disk).words(7, 8)[at:] for at in (0, 4, 6))
    assert monitor[:4] == ["--chardev", "socket,id=monitor,fd=8", "--monitor", "chardev=monitor"]
    assert (node[0], export[0], len(export)) == ("--blockdev", "--export", 2)
    return json.loads(node[1]), json.loads(export[1])


def test_the_kernel_is_told_of_each_place() -> None:
    options = disk_options(Path("/sockets"))
    assert (options[0], len(options)) == ("virtio_uml.device=/sockets/disk0.sock:2", DISKS_MAX)
    assert [disk_socket(disk) for disk in (ROOT, DATA)] == ["disk0.sock", "disk1.sock"]


def test_the_guest_finds_them_by_the_kernels_names_of_their_places() -> None:
    assert [guest_path(disk) for disk in (ROOT, DATA)] == ["virtio-uml.2", "virtio-uml.3"]
    for slot in (FIRST_SLOT - 1, FIRST_SLOT + DISKS_MAX):
        with pytest.raises(VmmRefused, match="is none of a disk"):
            guest_path(Disk("d", Path("/d"), slot))


def test_an_overlay_is_qcow2_over_a_base_that_is_only_read() -> None:
    node, export = words_of(ROOT)
    assert (node["driver"], node["file"]["filename"]) == ("qcow2", "/disks/disk")
    assert node["backing"] == {
        "driver": "raw",
        "read-only": True,
        "file": {"driver": "file", "filename": "/disks/base"},
    }
    assert node["file"]["discard"] == "unmap"
    assert export == {
        "type": "vhost-user-blk",
        "id": "disk0",
        "node-name": node["node-name"],
        "addr": {"type": "fd", "str": "7"},
        "writable": True,
        "writethrough": False,
    }


def test_what_is_written_to_a_disk_that_stays_has_arrived() -> None:
    """The guest is told of no write cache, so it flushes nothing."""
    (_, first), (_, second) = (words_of(disk) for disk in (DATA, DEVICE))
    assert (first["writable"], first["writethrough"]) == (True, True)
    assert (second["writable"], second["writethrough"]) == (False, True)
    _, overlay = words_of(structs.replace(ROOT, kept=True))
    assert overlay["writethrough"] is True
    _, unflushed = words_of(
        Disk("d", Path("/d"), FIRST_SLOT, settings=DiskSettings(no_flush=True, logical_sector_bytes=4096))
    )
    assert unflushed["writethrough"] is False
    assert unflushed["logical-block-size"] == 4096


def test_each_disk_has_its_own_node() -> None:
    assert [disk_node(disk) for disk in (ROOT, DATA, DEVICE)] == ["disk0", "disk1", "disk2"]
    assert words_of(DATA)[0]["node-name"] == "disk1"


@pytest.mark.parametrize(
    ("disk", "files"),
    [
        (ROOT, [("/disks/disk", ROOT.path, Access.WRITE), ("/disks/base", ROOT.base, Access.READ)]),
        (DATA, [("/disks/disk", DATA.path, Access.WRITE)]),
        (DEVICE, [("/disks/disk", DEVICE.path, Access.DEVICE)]),
    ],
)
def test_the_jail_has_the_files_of_its_disk_and_no_others(disk: Disk, files: list[object]) -> None:
    jail = DiskServerPlan(DAEMON, disk).jail(1234, {"/lib": Path("/usr/lib")})
    assert (jail.uid, jail.netns, jail.capabilities) == (1234, None, frozenset({1}))
    assert [(bind.target, bind.source, bind.access) for bind in jail.binds] == [
        ("/qemu-storage-daemon", DAEMON, Access.EXECUTE),
        ("/lib", Path("/usr/lib"), Access.EXECUTE),
        ("/dev/null", Path("/dev/null"), Access.DEVICE),
        *files,
    ]


def test_it_is_described_by_its_words() -> None:
    assert DiskServerPlan(DAEMON, DATA).describe().splitlines()[:2] == [str(DAEMON), "  --chardev"]


def test_a_fresh_process_finds_the_daemon() -> None:
    assert is_vm("qemu-storage-daemon /run/vc/vm/a\0--blockdev\0", Path("/run/vc/vm/a"))
    assert not is_vm("qemu-storage-daemon /run/vc/vm/ab\0--blockdev\0", Path("/run/vc/vm/a"))
