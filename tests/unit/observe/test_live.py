"""What QEMU and the agent say, parsed: shapes as QEMU 7.2 has them, and others."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from katapod.observe.live import ENTRIES_MAX, TEXT_MAX, parse_guest
from katapod.rpc.pb import inspection_pb2
from katapod.vmm.qemu.facts import parse_hypervisor

DISK = "/machine/peripheral/virtio-root-1/virtio-backend"
ANSWERS: dict[str, Any] = {
    "query-version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": "Debian"},
    "query-status": {"status": "running", "running": True, "singlestep": False},
    "query-kvm": {"enabled": False, "present": True},
    "query-cpus-fast": [{"cpu-index": 0, "thread-id": 99, "target": "x86_64", "qom-path": "/x", "props": {}}],
    "query-memory-size-summary": {"base-memory": 268435456, "plugged-memory": 0},
    "query-pci": [
        {
            "bus": 0,
            "devices": [
                {
                    "bus": 0,
                    "slot": 2,
                    "function": 0,
                    "class_info": {"class": 1540, "desc": "PCI bridge"},
                    "id": {"vendor": 6966, "device": 1},
                    "qdev_id": "pci-bridge-0",
                    "pci_bridge": {
                        "bus": {"number": 1},
                        "devices": [{"bus": 1, "slot": 3, "function": 0, "qdev_id": "virtio-root-1"}],
                    },
                },
                {"bus": 0, "slot": 3, "function": 0, "id": {"vendor": 0x1AF4, "device": 0x1005}},
            ],
        }
    ],
    "query-block": [
        {
            "device": "",
            "qdev": DISK,
            "inserted": {
                "file": "json:{}",
                "ro": False,
                "drv": "qcow2",
                "image": {
                    "filename": 'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/l/root.qcow2"}}',
                    "format": "qcow2",
                    "virtual-size": 4096,
                    "backing-image": {"filename": "/img/root.ext4", "format": "raw", "virtual-size": 4096},
                },
            },
        },
        {"device": "cd"},
    ],
    "query-blockstats": [{"qdev": DISK, "stats": {"rd_bytes": 10, "wr_bytes": 20, "rd_operations": 1}}],
    "query-memory-devices": [{"type": "dimm", "data": {"id": "dimm0", "size": 128 << 20, "addr": 1}}],
    "qom-list": [
        {"name": "type", "type": "string"},
        {"name": "virtio-root-1", "type": "child<virtio-blk-pci>"},
        {"name": "dimm0", "type": "child<pc-dimm>"},
    ],
}


def test_hypervisor() -> None:
    found = parse_hypervisor(ANSWERS, {99: 4711})
    assert (found.version, found.status, found.accelerator) == ("7.2.22 Debian", "running", "tcg")
    assert [(each.pci, each.device_id, each.driver, each.what, each.guest_path) for each in found.devices] == [
        ("00:02.0", "pci-bridge-0", "", "PCI bridge", "02"),
        ("01:03.0", "virtio-root-1", "virtio-blk-pci", "", "02/03"),
        ("00:03.0", "", "", "virtio random numbers", ""),
        ("", "dimm0", "pc-dimm", "128 MiB of memory", ""),
    ]
    (disk,) = found.disks
    assert (disk.file, disk.backing, disk.form) == ("/l/root.qcow2", "/img/root.ext4", "qcow2")
    assert (disk.read_bytes, disk.written_bytes, disk.guest_path) == (10, 20, "02/03")


def test_what_qemu_knows_by_other_names() -> None:
    """Its threads have other numbers in its PID namespace, and it has no names of the files that it was handed."""
    sets = [
        {"fdset-id": 4, "fds": [{"fd": 30, "opaque": "/l/root.qcow2"}]},
        {"fdset-id": 5, "fds": [{"fd": 31, "opaque": "/img"}]},
    ]
    inserted = {"file": "/dev/fdset/4", "ro": False, "drv": "qcow2"}
    inserted |= {"image": {"filename": "/dev/fdset/4", "backing-image": {"filename": "/dev/fdset/5"}}}
    answers = {**ANSWERS, "query-fdsets": sets, "query-block": [{"qdev": DISK, "inserted": inserted}]}
    found = parse_hypervisor(answers, {99: 4711})
    assert [(cpu.number, cpu.thread) for cpu in found.cpus] == [(0, 4711)]
    assert [(disk.file, disk.backing) for disk in found.disks] == [("/l/root.qcow2", "/img")]


def test_part_of_the_answers_is_enough() -> None:
    assert parse_hypervisor({}, {}).accelerator == ""


@pytest.mark.parametrize("question", [key for key, value in ANSWERS.items() if isinstance(value, list)])
def test_another_shape_is_refused(question: str) -> None:
    for wrong in ("text", [1], [{"devices": 5, "data": 5, "inserted": 5, "stats": 5, "name": 5, "cpu-index": "x"}]):
        with pytest.raises(msgspec.ValidationError):
            parse_hypervisor({**ANSWERS, question: wrong}, {})


def test_the_guest_is_cut_to_our_limits() -> None:
    said = inspection_pb2.InspectResponse(kernel="k" * 5000, uptime_s=float("nan"))
    for number in range(ENTRIES_MAX + 5):
        said.processes.add(pid=number, command="c" * 1000)
    found = parse_guest(said)
    assert len(found.processes) == ENTRIES_MAX
    assert found.cut
    assert len(found.kernel) == TEXT_MAX
    assert {len(process.command) for process in found.processes} == {TEXT_MAX}
    assert found.uptime_s == 0.0


@settings(max_examples=100)
@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    try:
        said = inspection_pb2.InspectResponse.FromString(data)
    except Exception:  # protobuf's DecodeError: refused by the client before it gets here
        return
    msgspec.json.encode(parse_guest(said))
