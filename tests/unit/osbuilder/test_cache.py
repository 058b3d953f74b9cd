"""The directory of finished images: links, atomic switch, lock, leftovers."""

import asyncio
import itertools
import json
import os
from pathlib import Path

import pytest

from katapod.model.flavour import FLAVOURS, GUEST_VMMS, Flavour, GuestVmm, initrd_link, kernel_link
from katapod.osbuilder.cache import (
    BuiltImage,
    Manifest,
    current_image,
    current_images,
    install_image,
    list_images,
    locked_cache,
    switch_links,
    work_directory,
)
from katapod.osbuilder.errors import OsbuilderError
from katapod.osbuilder.prune import prune_images


def make_image(
    cache: Path,
    version: str = "6.1.0",
    *,
    key: str = "k1",
    content: bytes = b"initrd",
    flavour: Flavour = "agent",
    vmm: GuestVmm = "qemu",
) -> BuiltImage:
    (cache / "osbuilder-images").mkdir(parents=True, exist_ok=True)
    with work_directory(cache) as work:
        finished = work / "finished"
        finished.mkdir()
        (finished / "vmlinux").write_bytes(b"kernel of " + key.encode())
        (finished / f"debian-kata-{version}.initrd").write_bytes(content)
        manifest = Manifest(
            key=key,
            kernel_version=version,
            kernel="vmlinux",
            kernel_size=len(b"kernel of " + key.encode()),
            initrd=f"debian-kata-{version}.initrd",
            initrd_size=len(content),
            pvh=True,
            notes=("no xfs",),
            flavour=flavour,
            vmm=vmm,
        )
        return install_image(cache, finished, manifest)


def test_links_lead_to_the_image(tmp_path: Path) -> None:
    image = make_image(tmp_path)
    assert current_image(tmp_path) is None

    switch_links(tmp_path, image)

    assert current_image(tmp_path) == image
    directory = tmp_path / "osbuilder-images/6.1.0"
    assert (tmp_path / kernel_link("agent")).resolve() == directory / "vmlinux"
    assert (tmp_path / initrd_link("agent")).resolve() == directory / "debian-kata-6.1.0.initrd"
    assert image.notes == ("no xfs",)


def test_another_kernel_is_switched_to_and_the_former_image_stays(tmp_path: Path) -> None:
    former = make_image(tmp_path)
    switch_links(tmp_path, former)

    switch_links(tmp_path, make_image(tmp_path, "6.2.0", key="k2"))

    current = current_image(tmp_path)
    assert current is not None
    assert current.kernel_version == "6.2.0"
    assert former.initrd.is_file()


def test_kernel_and_initrd_change_in_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    former = make_image(tmp_path)
    switch_links(tmp_path, former)
    renames: list[str] = []
    rename = Path.rename

    def counted(self: Path, target: Path) -> Path:
        renames.append(target.name)
        return rename(self, target)

    second = make_image(tmp_path, "6.2.0", key="k2")
    monkeypatch.setattr(Path, "rename", counted)
    switch_links(tmp_path, second)

    assert renames == ["current"]


def test_an_image_of_the_same_kernel_takes_the_place_of_the_former(tmp_path: Path) -> None:
    switch_links(tmp_path, make_image(tmp_path))

    switch_links(tmp_path, make_image(tmp_path, key="k2", content=b"another initrd"))

    current = current_image(tmp_path)
    assert current is not None
    assert (current.key, current.initrd.read_bytes()) == ("k2", b"another initrd")
    assert sorted(p.name for p in (tmp_path / "osbuilder-images").iterdir()) == ["6.1.0", "current"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest", "unknown key", "other link"])
def test_an_incomplete_image_is_none(tmp_path: Path, damage: str) -> None:
    image = make_image(tmp_path)
    switch_links(tmp_path, image)
    manifest = image.initrd.parent / "manifest.json"
    if damage == "truncate":
        image.initrd.write_bytes(b"ini")
    elif damage == "remove":
        image.kernel.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    elif damage == "unknown key":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "extra": 1}))
    else:
        (tmp_path / kernel_link("agent")).unlink()
        (tmp_path / kernel_link("agent")).symlink_to("/etc/hostname")

    assert current_image(tmp_path) is None


def test_what_a_killed_builder_left_is_removed(tmp_path: Path) -> None:
    stale = tmp_path / "osbuilder-images/.building-abc"
    (stale / "deep").mkdir(parents=True)

    with work_directory(tmp_path) as work:
        assert not stale.exists()
        assert work.is_dir()
    assert not work.exists()


async def test_builders_take_turns(tmp_path: Path) -> None:
    order: list[str] = []

    async def builder(name: str) -> None:
        async with locked_cache(tmp_path):
            order.append(f"{name} in")
            await asyncio.sleep(0.05)
            order.append(f"{name} out")

    await asyncio.gather(builder("a"), builder("b"))

    assert order in (["a in", "a out", "b in", "b out"], ["b in", "b out", "a in", "a out"])


async def test_a_cache_directory_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OsbuilderError, match="cannot write to"):
        async with locked_cache(tmp_path / "file"):
            pass


def test_flavours_are_beside_each_other(tmp_path: Path) -> None:
    agent, systemd = make_image(tmp_path), make_image(tmp_path, key="s", flavour="systemd")
    switch_links(tmp_path, agent)
    switch_links(tmp_path, systemd)

    assert (current_image(tmp_path), current_image(tmp_path, "systemd")) == (agent, systemd)
    directory = tmp_path / "osbuilder-images/6.1.0+systemd"
    assert (tmp_path / "kata-containers-initrd-systemd.img").resolve().parent == directory
    assert (tmp_path / "vmlinuz-systemd.container").resolve() == directory / "vmlinux"


def node_with(root: Path, *versions: str) -> Path:
    for version in versions:
        (root / "lib/modules" / version).mkdir(parents=True)
    return root


async def test_prune_keeps_what_is_used_or_installed(tmp_path: Path) -> None:
    cache, node = tmp_path / "cache", node_with(tmp_path / "node", "6.3.0", "6.4.0")
    linked = make_image(cache, "6.1.0")  # its kernel was removed, and yet it is what guests start with
    running, gone = make_image(cache, "6.2.0"), make_image(cache, "5.9.0")
    spare, current = make_image(cache, "6.3.0"), make_image(cache, "6.4.0", flavour="systemd")
    switch_links(cache, linked)
    switch_links(cache, current)
    started = ["sh", "-c", "echo; read x", "vm", "-initrd", str(running.initrd)]
    vm = await asyncio.create_subprocess_exec(*started, stdin=-1, stdout=-1)
    try:
        assert vm.stdout is not None
        await vm.stdout.readline()  # a process that has just been made has no command line yet
        assert await prune_images(cache, system_root=node) == [gone]
        assert await prune_images(cache, system_root=node, also_installed=True) == [spare]
    finally:
        vm.kill()
        await vm.wait()
    assert await prune_images(cache, system_root=node) == [running]
    assert list_images(cache) == [linked, current]
    assert not list((cache / "osbuilder-images").glob(".building-*"))


def test_an_image_of_each_vmm_and_flavour_is_in_use_beside_the_others(tmp_path: Path) -> None:
    images = [
        make_image(tmp_path, vmm=vmm, flavour=flavour, key=f"{vmm} {flavour}")
        for vmm, flavour in itertools.product(GUEST_VMMS, FLAVOURS)
    ]
    for image in images:
        switch_links(tmp_path, image)

    assert sorted(image.key for image in current_images(tmp_path)) == sorted(image.key for image in images)
    assert (tmp_path / "kata-containers-uml.img").resolve().parent.name == "6.1.0+uml"
    assert (tmp_path / "kata-containers-uml-systemd.img").resolve().parent.name == "6.1.0+uml+systemd"
    assert (tmp_path / "vmlinuz-uml-systemd.container").resolve().parent.name == "6.1.0+uml+systemd"
    assert (tmp_path / "kata-containers-initrd-systemd.img").resolve().parent.name == "6.1.0+systemd"
    assert [image.key for image in list_images(tmp_path)] == [
        "qemu agent", "qemu systemd", "uml agent", "uml systemd"
    ]  # fmt: skip


@pytest.mark.parametrize(("vmm", "executable"), [("qemu", False), ("uml", True)])
def test_only_a_kernel_that_is_a_program_can_be_executed(tmp_path: Path, vmm: GuestVmm, executable: bool) -> None:
    image = make_image(tmp_path, vmm=vmm)

    assert os.access(image.kernel, os.X_OK) == executable
    assert not os.access(image.initrd, os.X_OK)


async def test_an_image_stays_as_long_as_the_modules_of_its_own_vmm_do(tmp_path: Path) -> None:
    for vmm in GUEST_VMMS:
        make_image(tmp_path, vmm=vmm)
    (tmp_path / "root/usr/lib/uml/modules/6.1.0").mkdir(parents=True)

    removed = await prune_images(tmp_path, system_root=tmp_path / "root")

    assert [image.vmm for image in removed] == ["qemu"]
    assert [image.vmm for image in list_images(tmp_path)] == ["uml"]


def test_a_manifest_that_was_written_before_there_were_vmms_is_one_of_qemu(tmp_path: Path) -> None:
    image = make_image(tmp_path)
    manifest = image.initrd.parent / "manifest.json"
    content = json.loads(manifest.read_text())
    for name in ("vmm", "kernel_sha256", "libraries"):
        del content[name]
    manifest.write_text(json.dumps(content))

    assert list_images(tmp_path) == [image]
