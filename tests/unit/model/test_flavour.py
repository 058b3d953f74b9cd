"""`guest_flavour` moves the defaults of kernel and initrd, and no path of the user's own."""

from katapod.model.config import parse_config

CACHE = "/var/cache/kata-containers"


def paths(text: str) -> tuple[str, str]:
    qemu = parse_config(text.encode()).config.qemu
    return qemu.kernel, qemu.initrd


def test_the_flavour_moves_the_defaults() -> None:
    systemd = '[katapod]\nguest_flavour = "systemd"\n'
    moved = (f"{CACHE}/vmlinuz-systemd.container", f"{CACHE}/kata-containers-initrd-systemd.img")
    assert paths("") == (f"{CACHE}/vmlinuz.container", f"{CACHE}/kata-containers-initrd.img")
    assert paths(systemd) == moved
    assert paths(f'[hypervisor.qemu]\nkernel = "{CACHE}/vmlinuz.container"\n{systemd}') == moved
    assert paths(f'[hypervisor.qemu]\ninitrd = "/srv/my.img"\n{systemd}') == (moved[0], "/srv/my.img")


def test_the_flavour_moves_those_of_user_mode_linux_as_well() -> None:
    config = parse_config(b'[hypervisor.uml]\nkernel = "/srv/linux"\n[katapod]\nguest_flavour = "systemd"\n').config

    assert (config.uml.kernel, config.uml.image) == ("/srv/linux", f"{CACHE}/kata-containers-uml-systemd.img")
    assert parse_config(b"").config.uml.image == f"{CACHE}/kata-containers-uml.img"
