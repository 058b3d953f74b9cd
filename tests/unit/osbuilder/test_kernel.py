"""Which kernel is taken, from a made-up /boot and /lib/modules."""

import struct
from pathlib import Path

import pytest

from katapod.osbuilder.errors import KernelMissing, KernelUnusable
from katapod.osbuilder.kernel import find_kernel, find_uml_kernel, kernel_release, read_module_index


def install(root: Path, version: str, *, in_modules: bool = False, modules: bool = True) -> Path:
    directory = root / "lib/modules" / version
    if modules:
        directory.mkdir(parents=True)
        (directory / "modules.dep").write_text("kernel/a.ko:\n")
    image = directory / "vmlinuz" if in_modules else root / f"boot/vmlinuz-{version}"
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(b"image")
    return image


def bzimage_of(version: str) -> bytes:
    image = bytearray(0x400)
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x20E, 0x300 - 0x200)
    text = f"{version} (build@host) #1 SMP\0".encode()
    image[0x300 : 0x300 + len(text)] = text
    return bytes(image)


def test_the_newest_version_wins_and_numbers_compare_as_numbers(tmp_path: Path) -> None:
    for version in ("6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64", "5.99.0-1"):
        install(tmp_path, version)

    assert find_kernel(system_root=tmp_path).version == "6.1.0-56-cloud-amd64"


def test_a_release_candidate_is_older_than_its_release(tmp_path: Path) -> None:
    for version in ("6.12.0-rc3", "6.12.0", "6.12.0-rc10"):
        install(tmp_path, version)

    assert find_kernel(system_root=tmp_path).version == "6.12.0"


def test_an_image_in_the_module_directory_is_found(tmp_path: Path) -> None:
    image = install(tmp_path, "4.18.0-305.el8", in_modules=True)

    assert find_kernel(system_root=tmp_path).image == image


def test_an_image_without_modules_does_not_count(tmp_path: Path) -> None:
    install(tmp_path, "6.9.0", modules=False)
    install(tmp_path, "6.1.0")

    assert find_kernel(system_root=tmp_path).version == "6.1.0"


def test_no_kernel_at_all_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(KernelMissing, match="cannot find a kernel") as caught:
        find_kernel(system_root=tmp_path)
    assert "apt install linux-image-cloud-amd64" in caught.value.hint


def test_override_by_version(tmp_path: Path) -> None:
    install(tmp_path, "6.1.0")
    install(tmp_path, "6.2.0")

    assert find_kernel("6.1.0", system_root=tmp_path).version == "6.1.0"
    with pytest.raises(KernelMissing, match=r"installed are 6\.1\.0, 6\.2\.0"):
        find_kernel("7.0", system_root=tmp_path)


def test_override_by_path_takes_the_version_from_the_file(tmp_path: Path) -> None:
    install(tmp_path, "6.1.0-7")
    image = tmp_path / "my-kernel"
    image.write_bytes(bzimage_of("6.1.0-7"))

    kernel = find_kernel(str(image), system_root=tmp_path)

    assert (kernel.version, kernel.image, kernel.module_dir) == (
        "6.1.0-7",
        image,
        tmp_path / "lib/modules/6.1.0-7",
    )


def test_release_of_a_kernel_file(tmp_path: Path) -> None:
    """By what is inside: the guest's kernel is called "kernel"."""
    found = tmp_path / "kernel"
    found.write_bytes(bzimage_of("6.1.0-57-cloud-amd64"))
    assert kernel_release(found) == "6.1.0-57-cloud-amd64"
    found.write_bytes(b"\x7fELF" + b"\0" * 70_000 + b"Linux version 6.12.9+deb13 (who@where) (gcc) #1\n\0")
    assert kernel_release(found) == "6.12.9+deb13"
    for unknown in (b"\x7fELF" + b"\0" * 100, b"text", b""):
        found.write_bytes(unknown)
        assert kernel_release(found) == ""


def test_override_by_path_fails_without_file_version_or_modules(tmp_path: Path) -> None:
    with pytest.raises(KernelMissing, match="no such file"):
        find_kernel(str(tmp_path / "none"), system_root=tmp_path)
    image = tmp_path / "kernel"
    image.write_bytes(b"something else")
    with pytest.raises(KernelUnusable, match="cannot tell the version"):
        find_kernel(str(image), system_root=tmp_path)
    image.write_bytes(bzimage_of("6.6.6"))
    with pytest.raises(KernelMissing, match=r"modules are not in .*6\.6\.6"):
        find_kernel(str(image), system_root=tmp_path)


def test_modules_without_index_ask_for_depmod(tmp_path: Path) -> None:
    install(tmp_path, "6.1.0")
    kernel = find_kernel(system_root=tmp_path)
    (kernel.module_dir / "modules.dep").unlink()

    with pytest.raises(KernelMissing) as caught:
        read_module_index(kernel)
    assert caught.value.hint == "run depmod 6.1.0"


def install_uml(root: Path, *, modules_of: str = "6.1.176") -> None:
    program = root / "usr/bin/linux.uml"
    program.parent.mkdir(parents=True)
    program.write_bytes(b"\x7fELF" + bytes(60) + b"Linux version 6.1.176 (buildd@x86) #1\n")
    module_dir = root / "usr/lib/uml/modules" / modules_of
    module_dir.mkdir(parents=True)
    (module_dir / "modules.dep").write_text("kernel/a.ko:\n")


def test_user_mode_linux_is_found_with_the_modules_of_its_own_version(tmp_path: Path) -> None:
    install_uml(tmp_path)

    kernel = find_uml_kernel(system_root=tmp_path)

    assert (kernel.version, kernel.vmm) == ("6.1.176", "uml")
    assert kernel.image == tmp_path / "usr/bin/linux.uml"
    assert list(read_module_index(kernel).files) == ["a"]


def test_a_node_without_user_mode_linux_is_told_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(KernelMissing, match="cannot find User-mode Linux") as caught:
        find_uml_kernel(system_root=tmp_path)
    assert "user-mode-linux" in caught.value.hint


def test_modules_of_another_version_are_none(tmp_path: Path) -> None:
    install_uml(tmp_path, modules_of="6.1.170")

    with pytest.raises(KernelMissing, match=r"its modules are not in .*/6\.1\.176"):
        find_uml_kernel(system_root=tmp_path)


def test_a_program_that_is_no_kernel_is_refused(tmp_path: Path) -> None:
    install_uml(tmp_path)
    (tmp_path / "usr/bin/linux.uml").write_bytes(b"\x7fELF" + bytes(60))

    with pytest.raises(KernelUnusable, match="it is no kernel"):
        find_uml_kernel(system_root=tmp_path)
