"""The picture: a document that parses, with hostile names as text, and nothing that a page would run or load."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from katapod.model import inspection as facts
from katapod.observe.picture import render_picture, shown_bytes
from katapod.observe.svg import escape_text, fit_text

HOSTILE = "</text><script>alert(1)</script>\x1b[31m\"' onload=x &amp; \u202e\x00\ud800"


def sandbox(name: str) -> facts.SandboxFacts:
    """All parts, every name of them as given."""
    link = facts.Link(name=name, index=2, kind="veth", peer_index=7, mac=name, master=name, addresses=(name,))
    mount = facts.SharedMount(name=name, host=name, guest=name, container=name, destination=name)
    return facts.SandboxFacts(
        sandbox_id=name,
        state="running",
        taken_at=0.0,
        labels={"io.kubernetes.pod.name": name},
        containers=(facts.ContainerFacts(container_id=name, name=name),),
        processes=(facts.Process(pid=5, parent=1, role="vmm", command=(name,)),),
        hypervisor=facts.Hypervisor(
            devices=(facts.Device(device_id=name, driver="virtio-net-pci", guest_path=name),),
            disks=(facts.Disk(device_id=name, file=name, backing=name, form=name, guest_mount=name),),
        ),
        network=facts.NetworkFacts(
            netns=name,
            links=(link, facts.Link(name="tap0_kata")),
            nics=(facts.Nic(interface=name, tap="tap0_kata", peer=link),),
            redirects=(facts.Redirect(source=name, target="tap0_kata", packets=4321),),
        ),
        share=facts.ShareFacts(tag=name, directory=name, guest=name, mounts=(mount,) * 20),
        channel=facts.Channel(kind="vsock", address=name),
        guest=facts.GuestFacts(kernel=name, links=(facts.GuestLink(name=name, mac=name),)),
        missing=(facts.Missing("network.nft", name),),
    )


def test_disks_that_another_process_serves() -> None:
    """User-mode Linux knows nothing of its disks: they come from the record."""
    disk = facts.RecordedDevice(kind="disk", name="root-1", host="/l/root.qcow2", backing="/b", guest_path="/dev/vda")
    mount = facts.GuestMount("/dev/vda", "/run/layers/c1", "ext4", "rw")
    found = facts.SandboxFacts(
        sandbox_id="s1",
        state="running",
        taken_at=0.0,
        accelerator="uml",
        processes=(facts.Process(pid=6, parent=1, role="storage", command=("qemu-storage-daemon /run/vc/vm/s1",)),),
        hypervisor=facts.Hypervisor(name="User-mode Linux"),
        devices=(disk, facts.RecordedDevice(kind="nic", name="eth0")),
        guest=facts.GuestFacts(mounts=(mount,)),
    )
    texts = [element.text for element in ElementTree.fromstring(render_picture(found)).iter() if element.text]
    assert texts.count("root-1 in qemu-storage-daemon 6") == 1
    assert {"/l/root.qcow2", "over /b", "disk at /dev/vda", "/run/layers/c1"} <= set(texts)


def test_hostile_names_are_text() -> None:
    picture = render_picture(sandbox(HOSTILE))
    root = ElementTree.fromstring(picture)
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert tags == {"svg", "rect", "text", "g", "title", "line", "polygon"}
    attributes = {key for element in root.iter() for key in element.attrib}
    assert not any(key.startswith("on") or "href" in key or key == "style" for key in attributes)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", picture)
    assert any("<script>" in (element.text or "") for element in root.iter())  # there, as text


@settings(max_examples=30)
@given(st.text(max_size=200))
def test_any_name(name: str) -> None:
    ElementTree.fromstring(render_picture(sandbox(name)).encode())


def test_the_live_numbers_are_in_it() -> None:
    texts = [element.text or "" for element in ElementTree.fromstring(render_picture(sandbox("eth0"))).iter()]
    assert "tc 4321" in texts
    assert "eth0@if7" in texts
    assert any("and 12 more" in text for text in texts)


def test_a_record_alone() -> None:
    stopped = facts.SandboxFacts(
        sandbox_id="s", state="stopped", taken_at=0.0, missing=(facts.Missing("all that lives", "it has stopped"),)
    )
    root = ElementTree.fromstring(render_picture(stopped))
    assert any("it has stopped" in (element.text or "") for element in root.iter())


def test_texts_stay_in_their_boxes() -> None:
    assert fit_text("a" * 100, 100, 10) == "a" * 7 + "\N{HORIZONTAL ELLIPSIS}" + "a" * 8
    assert fit_text("short", 100, 10) == "short"
    assert escape_text("a\x00b<") == "a\N{REPLACEMENT CHARACTER}b&lt;"


@pytest.mark.parametrize(("size", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (200 << 20, "200 MiB")])
def test_sizes(size: int, shown: str) -> None:
    assert shown_bytes(size) == shown
