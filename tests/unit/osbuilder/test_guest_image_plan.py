"""The plan of the guest image: module order, what is missing, the agent's script, the description."""

import pytest
from msgspec.structs import replace

from katapod.plan.guest_image import (
    FileKind,
    GuestExtras,
    GuestFile,
    GuestImageFacts,
    GuestProgram,
    KernelModule,
    ModuleMissing,
    PythonFile,
    PythonFileKind,
    parse_module_index,
    plan_guest_image,
    plan_image_modules,
    plan_modules,
)

DEP = """\
kernel/drivers/virtio/virtio.ko:
kernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio_pci.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
kernel/drivers/char/virtio_console.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
kernel/fs/fuse/fuse.ko.xz:
kernel/fs/fuse/virtiofs.ko.xz: kernel/fs/fuse/fuse.ko.xz kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/char/hw_random/virtio-rng.ko: kernel/drivers/virtio/virtio.ko
kernel/lib/crc7.ko.zst:
kernel/fs/squashfs/squashfs.ko:
"""
BUILTIN = "kernel/fs/overlayfs/overlay.ko\nkernel/drivers/block/virtio_blk.ko\n"


def names(modules: tuple[KernelModule, ...]) -> list[str]:
    return [module.name for module in modules]


def test_modules_load_after_what_they_need_and_only_once() -> None:
    plan = plan_modules(parse_module_index(DEP, BUILTIN))

    assert names(plan.early) == ["virtio", "virtio_ring", "virtio_pci", "virtio_console"]
    assert names(plan.late) == ["fuse", "virtiofs", "virtio_rng"]
    assert names(plan.on_demand) == ["squashfs"]
    assert plan.builtin == ("overlay", "virtio_blk")


def test_compressed_modules_are_unpacked_in_the_guest() -> None:
    plan = plan_modules(parse_module_index(DEP, BUILTIN))

    assert {module.source: module.target for module in plan.late}[
        "kernel/fs/fuse/fuse.ko.xz"
    ] == "kernel/fs/fuse/fuse.ko"


def test_what_is_loaded_on_demand_stays_compressed() -> None:
    dep = (
        DEP + "kernel/net/netfilter/x_tables.ko:\nkernel/net/ipv4/netfilter/ip_tables.ko.xz: "
        "kernel/net/netfilter/x_tables.ko\nkernel/net/netfilter/ipvs/ip_vs_rr.ko:\nkernel/net/sctp/sctp.ko:\n"
        "kernel/drivers/net/dummy.ko:\nkernel/fs/xfs/xfs.ko:\n"
    )
    plan = plan_image_modules(parse_module_index(dep, BUILTIN), GuestExtras(more_modules=("xfs",)))

    targets = {module.name: module.target.removeprefix("kernel/") for module in plan.on_demand}
    assert targets == {
        "squashfs": "fs/squashfs/squashfs.ko.xz",
        "dummy": "drivers/net/dummy.ko.xz",
        "x_tables": "net/netfilter/x_tables.ko.xz",
        "ip_tables": "net/ipv4/netfilter/ip_tables.ko.xz",
        "ip_vs_rr": "net/netfilter/ipvs/ip_vs_rr.ko.xz",
        "xfs": "fs/xfs/xfs.ko.xz",
    }, "netfilter whole, by its folders; what a recipe asks for; nothing else, such as sctp"
    assert all(module.target.endswith(".ko") for module in (*plan.early, *plan.late))


def test_soft_dependencies_are_honoured_where_there_is_such_a_module() -> None:
    softdep = "# a comment\nsoftdep virtio-rng pre: crc7 no_such_module post: squashfs\n"

    plan = plan_modules(parse_module_index(DEP, BUILTIN, softdep))

    assert names(plan.late) == ["fuse", "virtiofs", "crc7", "virtio_rng", "squashfs"]
    assert plan.on_demand == ()


def test_soft_dependencies_in_a_circle_end() -> None:
    softdep = "softdep fuse pre: virtiofs\n"

    plan = plan_modules(parse_module_index(DEP, BUILTIN, softdep))

    assert names(plan.late)[:2] == ["fuse", "virtiofs"]


def test_a_missing_required_module_is_an_error_that_names_it() -> None:
    with pytest.raises(ModuleMissing, match="it has no overlay, neither as module nor built in") as caught:
        plan_modules(parse_module_index(DEP, "kernel/drivers/block/virtio_blk.ko\n"))
    assert "linux-image-cloud-amd64" in caught.value.hint


def test_a_missing_optional_module_is_a_warning() -> None:
    plan = plan_modules(parse_module_index(DEP, BUILTIN))

    assert "this kernel has no virtio_net: the guest goes without it" in plan.warnings


UML_DEP = """\
kernel/drivers/block/virtio_blk.ko:
kernel/drivers/virtio/virtio_balloon.ko:
kernel/drivers/char/virtio_console.ko:
kernel/fs/overlayfs/overlay.ko:
kernel/fs/fuse/fuse.ko:
kernel/fs/fuse/virtiofs.ko: kernel/fs/fuse/fuse.ko
kernel/lib/crc-ccitt.ko:
kernel/net/ipv6/ipv6.ko: kernel/lib/crc-ccitt.ko
"""


def test_user_mode_linux_has_no_pci_and_needs_overlay_for_its_root() -> None:
    plan = plan_image_modules(parse_module_index(UML_DEP, "kernel/fs/ext4/ext4.ko\n"), GuestExtras(), "uml")

    assert names(plan.early) == ["overlay", "virtio_console"]
    assert names(plan.late) == ["fuse", "virtiofs", "virtio_blk", "virtio_balloon", "crc_ccitt", "ipv6"]
    assert plan.builtin == ("ext4",)
    assert not [warning for warning in plan.warnings if "virtio" in warning or "vmgenid" in warning]


def test_what_user_mode_linux_has_built_in_and_does_not_start_is_no_module_for_a_recipe() -> None:
    index = parse_module_index(UML_DEP, "kernel/fs/xfs/xfs.ko\nkernel/fs/reiserfs/reiserfs.ko\n")

    with pytest.raises(ModuleMissing, match="cannot put xfs into the guest image"):
        plan_image_modules(index, GuestExtras(more_modules=("reiserfs", "xfs")), "uml")


def test_a_user_mode_linux_without_overlay_is_refused_with_the_package_that_has_it() -> None:
    dep = UML_DEP.replace("kernel/fs/overlayfs/overlay.ko:\n", "")

    with pytest.raises(ModuleMissing, match="it has no overlay") as caught:
        plan_image_modules(parse_module_index(dep), GuestExtras(), "uml")
    assert "user-mode-linux" in caught.value.hint


def facts() -> GuestImageFacts:
    return GuestImageFacts(
        kernel_version="6.1.0-1",
        module_index=parse_module_index(DEP, BUILTIN),
        python_interpreter="/usr/bin/python3.11",
        python_path=("/usr/lib/python3.11", "/usr/lib/python3.11/lib-dynload"),
        python_files=(
            PythonFile("/usr/lib/python3.11/os.py", "/usr/lib/python3.11/os.pyc", PythonFileKind.COMPILE),
            PythonFile("/src/katapod/__init__.py", "/usr/lib/katapod/katapod/__init__.pyc", PythonFileKind.COMPILE),
        ),
        programs=(
            GuestProgram("/usr/bin/crun", "/usr/bin/crun", without=("libsystemd.so.0",)),
            GuestProgram("/usr/bin/busybox", "/usr/bin/busybox"),
            GuestProgram("/opt/ps", "/usr/bin/ps"),
        ),
        busybox_applets=("bin/ls", "usr/bin/env", "sbin/modprobe", "bin/busybox", "bin/ps", "sbin/init", "linuxrc"),
    )


def test_the_agent_script_searches_no_other_directory_than_those_with_modules() -> None:
    plan = plan_guest_image(facts(), entry_point="katapod.agent.main:main")

    script = next(text for text in plan.texts if text.path == "/usr/bin/kata-agent")
    assert script.mode == 0o755
    assert script.content == (
        "#!/usr/bin/python3.11 -IBS\n"
        "import sys\n"
        "sys.path[:] = ['/usr/lib/python3.11', '/usr/lib/python3.11/lib-dynload', '/usr/lib/katapod']\n"
        "from katapod.agent.main import main\n"
        "sys.exit(main())\n"
    )
    assert plan.symlinks == (("/init", "usr/bin/kata-agent"),)


def test_module_lists_are_absolute_paths_in_load_order() -> None:
    plan = plan_guest_image(facts(), entry_point="a.b:c")

    early = next(text.content for text in plan.texts if text.path == "/etc/katapod/modules-early")
    assert early.splitlines()[0] == "/usr/lib/modules/6.1.0-1/kernel/drivers/virtio/virtio.ko"
    assert early.splitlines()[-1] == "/usr/lib/modules/6.1.0-1/kernel/drivers/char/virtio_console.ko"


def test_busybox_supplies_only_names_that_nothing_else_does_and_never_init() -> None:
    plan = plan_guest_image(facts(), entry_point="a.b:c")

    assert plan.applet_links == ("/usr/bin/ls", "/usr/sbin/modprobe", "/usr/bin/env")


def test_description_names_everything_and_does_not_depend_on_the_order_of_facts() -> None:
    from msgspec.structs import replace

    one = facts()
    other = replace(one, python_files=one.python_files[::-1], programs=one.programs[::-1])

    text = plan_guest_image(one, entry_point="a.b:c").describe()

    assert text == plan_guest_image(other, entry_point="a.b:c").describe()
    assert "program /usr/bin/crun from /usr/bin/crun without libsystemd.so.0" in text.splitlines()
    assert "module late virtiofs from kernel/fs/fuse/virtiofs.ko.xz" in text.splitlines()
    assert "module built in overlay" in text.splitlines()
    assert "link /init to usr/bin/kata-agent" in text.splitlines()


def test_a_package_wins_over_busybox_and_a_recipe_over_our_texts() -> None:
    added = (
        GuestFile("/usr/bin/env", FileKind.PROGRAM, "/usr/bin/env", 0o755),
        GuestFile("/etc/hosts", FileKind.DATA, "/srv/hosts"),
    )
    plan = plan_guest_image(replace(facts(), extras=GuestExtras(files=added)), entry_point="a.b:c")

    assert "/usr/bin/env" not in plan.applet_links
    assert "/usr/bin/ls" in plan.applet_links
    assert "/etc/hosts" not in [text.path for text in plan.texts]
    assert plan.files == tuple(sorted(added, key=lambda file: file.target))


def test_a_module_of_the_recipe_has_to_be_there() -> None:
    with pytest.raises(ModuleMissing, match="cannot put frobnicate into the guest image"):
        plan_guest_image(replace(facts(), extras=GuestExtras(more_modules=("frobnicate",))), entry_point="a.b:c")


def test_the_systemd_flavour_starts_systemd_with_the_agent_as_a_service() -> None:
    plan = plan_guest_image(replace(facts(), extras=GuestExtras(flavour="systemd")), entry_point="a.b:c")

    texts = {text.path: text for text in plan.texts}
    assert texts["/init"].mode == 0o755
    assert "/init" not in dict(plan.symlinks)
    service = texts["/usr/lib/systemd/system/kata-agent.service"].content
    assert "ExecStart=/usr/bin/kata-agent\n" in service
    links = dict(plan.symlinks)
    assert links["/etc/systemd/system/default.target"].endswith("/kata-containers.target")
    assert links["/usr/sbin/poweroff"] == "../bin/systemctl"
    assert texts["/etc/modules-load.d/katapod.conf"].content.split()[:1] == [plan.modules.early[0].name]
    assert "systemd-journal:x:" in texts["/etc/group"].content
