"""The image builder for User-mode Linux, for real: dracut packs, mkfs makes the disk, the kernel boots it."""

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from katapod.host.guest_kernel import kernel_libraries
from katapod.model.recipe import parse_recipe
from katapod.osbuilder import (
    BuiltImage,
    ImageRequest,
    KernelMissing,
    build_guest_image,
    current_image,
    current_images,
    prove_uml,
    prune_images,
)
from katapod.plan.guest_image import ModuleMissing
from kit.packed_modules import modules_packed_once

PROGRAM = Path("/usr/bin/linux.uml")
MODULES = Path("/usr/lib/uml/modules")
DISK_MAX = 32 << 20  # bytes

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not PROGRAM.exists(), reason="needs the package user-mode-linux"),
]

Built = tuple[ImageRequest, BuiltImage]


async def accept(kernel: Path, disk: Path) -> None:
    assert kernel.exists()
    assert disk.exists()


@pytest.fixture(autouse=True, scope="module")
def _modules_packed_once() -> Iterator[None]:
    with modules_packed_once():
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built and booted once, of a node's root that holds User-mode Linux and nothing else."""
    root = tmp_path_factory.mktemp("osbuilder-uml")
    (root / "node/usr/bin").mkdir(parents=True)
    (root / "node/usr/lib/uml").mkdir(parents=True)
    shutil.copy(PROGRAM, root / "node/usr/bin")
    (root / "node/usr/lib/uml/modules").symlink_to(MODULES)
    request = ImageRequest(cache_dir=root / "cache", vmm="uml", system_root=root / "node")
    return request, asyncio.run(build_guest_image(request, prove=prove_uml))


async def test_the_kernel_is_a_copy_beside_a_disk_of_the_guests_files(built: Built) -> None:
    request, image = built

    assert image.fresh
    assert replace(image, fresh=False) == current_image(request.cache_dir, "agent", "uml")
    assert current_image(request.cache_dir) is None, "none for QEMU"
    assert image.kernel.read_bytes() == PROGRAM.read_bytes()
    assert image.kernel_sha256 == hashlib.sha256(PROGRAM.read_bytes()).hexdigest()
    assert os.access(image.kernel, os.X_OK)
    assert image.initrd.parent == image.kernel.parent
    assert image.initrd.stat().st_blocks * 512 <= DISK_MAX
    assert (request.cache_dir / "kata-containers-uml.img").resolve() == image.initrd
    assert (request.cache_dir / "vmlinuz-uml.container").resolve() == image.kernel


async def test_its_libraries_are_told(built: Built) -> None:
    _, image = built

    libraries = await kernel_libraries(built[0].cache_dir / "vmlinuz-uml.container")

    assert [str(path) for path in libraries] == list(image.libraries)
    assert any(path.name == "libc.so.6" for path in libraries)
    assert all(path.exists() for path in libraries)
    assert json.loads((image.kernel.parent / "manifest.json").read_text())["vmm"] == "uml"


async def test_what_has_not_changed_is_not_built_again(built: Built) -> None:
    request, image = built

    assert await build_guest_image(request, prove=accept) == replace(image, fresh=False)


async def test_another_kernel_of_the_same_version_makes_a_new_image(built: Built) -> None:
    request, image = built
    program = request.system_root / "usr/bin/linux.uml"
    with program.open("ab") as handle:
        handle.write(b"\n")

    renewed = await build_guest_image(request, prove=accept)

    assert renewed.fresh
    assert renewed.key != image.key
    assert renewed.kernel.read_bytes() == PROGRAM.read_bytes() + b"\n"
    assert [found.key for found in current_images(request.cache_dir)] == [renewed.key]


async def test_a_node_without_it_is_told_what_to_install(built: Built, tmp_path: Path) -> None:
    with pytest.raises(KernelMissing, match="cannot find User-mode Linux") as caught:
        await build_guest_image(replace(built[0], cache_dir=tmp_path, system_root=tmp_path), prove=accept)
    assert "user-mode-linux" in caught.value.hint


async def test_a_module_of_a_recipe_that_it_has_not_is_an_error(built: Built, tmp_path: Path) -> None:
    recipe = parse_recipe(b'kernel_modules = ["wireguard"]', tmp_path / "recipe")

    with pytest.raises(ModuleMissing, match="cannot put wireguard into the guest image"):
        await build_guest_image(replace(built[0], cache_dir=tmp_path, recipe=recipe), prove=accept)


@pytest.mark.skipif(not Path("/usr/lib/systemd/systemd").exists(), reason="needs the package systemd")
async def test_systemd_can_be_process_1(tmp_path: Path) -> None:
    image = await build_guest_image(
        ImageRequest(cache_dir=tmp_path, vmm="uml", flavour="systemd"), prove=prove_uml
    )  # fmt: skip

    assert (tmp_path / "kata-containers-uml-systemd.img").resolve() == image.initrd
    assert current_image(tmp_path, "agent", "uml") is None


async def test_an_image_that_a_jail_has_mounted_stays(built: Built, tmp_path: Path) -> None:
    shutil.copytree(built[0].cache_dir, tmp_path / "cache", symlinks=True)
    image = current_image(tmp_path / "cache", "agent", "uml")
    assert image is not None
    for link in ("kata-containers-uml.img", "vmlinuz-uml.container", "osbuilder-images/current-uml"):
        (tmp_path / "cache" / link).unlink()
    (tmp_path / "jail").touch()
    script = f"mount --bind {image.initrd} {tmp_path / 'jail'} && echo mounted && exec sleep 60"
    jail = await asyncio.create_subprocess_exec("unshare", "-m", "sh", "-c", script, stdout=asyncio.subprocess.PIPE)
    assert jail.stdout is not None
    try:
        assert await jail.stdout.readline() == b"mounted\n"
        assert await prune_images(tmp_path / "cache", also_installed=True) == []
    finally:
        jail.kill()
        await jail.wait()

    assert [removed.key for removed in await prune_images(tmp_path / "cache", also_installed=True)] == [image.key]
