"""What the guest gets of a spec."""

from typing import Any

import msgspec
import pytest

from katapod.model import oci
from katapod.model.errors import SpecError
from katapod.model.mount_flags import Volume
from katapod.plan.container_spec import ContainerOptions, ProcessDefaults, plan_container_spec
from katapod.plan.guest_spec import (
    is_privileged,
    shares_pid_namespace,
    strip_for_guest,
    visible_mounts,
    without_host_devices,
)

GUEST_ROOT = "/run/kata-containers/shared/containers/c1/rootfs"
SHM = "/run/kata-containers/sandbox/shm"


def spec(*mounts: oci.Mount, **linux: Any) -> oci.Spec:
    return oci.Spec(
        oci_version="1.0.2",
        process=oci.Process(args=("sh",), cwd="/", selinux_label="l", apparmor_profile="p"),
        root=oci.Root(path="/host/root", readonly=True),
        hostname="h",
        mounts=mounts,
        hooks=oci.Hooks(prestart=(oci.Hook(path="/bin/true"),)),
        annotations={"a": "b"},
        linux=oci.Linux(**linux),
    )


def strip(given: oci.Spec, guest_seccomp: bool = True, **sources: str) -> oci.Spec:
    mount_sources = {"/" + name: source for name, source in sources.items()}
    return strip_for_guest(given, root_path=GUEST_ROOT, mount_sources=mount_sources, guest_seccomp=guest_seccomp)


def test_host_only_parts_are_dropped_and_the_rest_stays() -> None:
    found = strip(spec(mount_label="m", intel_rdt=oci.IntelRdt(), cgroups_path="/x", masked_paths=("/proc/kcore",)))
    assert found.hooks is None
    assert found.root == oci.Root(path=GUEST_ROOT, readonly=True)
    assert (found.process.selinux_label, found.process.apparmor_profile) == ("", "")
    assert (found.linux.mount_label, found.linux.intel_rdt) == ("", None)
    assert found.process.args == ("sh",)
    assert (found.hostname, found.annotations) == ("h", {"a": "b"})
    assert (found.linux.cgroups_path, found.linux.masked_paths) == ("/x", ("/proc/kcore",))


def test_seccomp_depends_on_the_guest() -> None:
    given = spec(seccomp=oci.Seccomp(default_action="SCMP_ACT_ALLOW"))
    assert strip(given).linux.seccomp == given.linux.seccomp
    assert strip(given, guest_seccomp=False).linux.seccomp is None


def test_resources_keep_memory_cpu_time_and_pids() -> None:
    found = strip(
        spec(
            resources=oci.Resources(
                devices=(oci.DeviceCgroup(allow=False),),
                memory=oci.Memory(limit=1),
                cpu=oci.Cpu(quota=2, period=3, cpus="0-1", mems="0"),
                pids=oci.Pids(limit=4),
                block_io=oci.BlockIO(weight=5),
                hugepage_limits=(oci.HugepageLimit(page_size="2MB", limit=6),),
                network=oci.Network(class_id=7),
            )
        )
    )
    assert found.linux.resources == oci.Resources(
        memory=oci.Memory(limit=1),
        cpu=oci.Cpu(quota=2, period=3),
        pids=oci.Pids(limit=4),
        hugepage_limits=(oci.HugepageLimit(page_size="2MB", limit=6),),
    )


ALL_DEVICES = oci.DeviceCgroup(allow=True, access="rwm")
SYS = oci.Mount(destination="/sys", type="sysfs", source="sysfs", options=("nosuid", "rw"))


@pytest.mark.parametrize(
    "rule", [ALL_DEVICES, oci.DeviceCgroup(allow=True, type="a", major=-1, minor=-1, access="rwm")]
)
def test_the_rule_that_opens_all_devices_is_kept_alone(rule: oci.DeviceCgroup) -> None:
    rules = (
        oci.DeviceCgroup(allow=False, access="rwm"),
        oci.DeviceCgroup(allow=True, type="b", major=8, minor=0),
        rule,
    )
    found = strip(spec(resources=oci.Resources(devices=rules, memory=oci.Memory(limit=1))))
    assert found.linux.resources == oci.Resources(devices=(ALL_DEVICES,), memory=oci.Memory(limit=1))


def test_privileged_is_also_who_has_every_right_but_that_rule() -> None:
    """As containerd tells it with privileged_without_host_devices."""
    caps = oci.Capabilities(bounding=("CAP_MKNOD", "CAP_SYS_ADMIN"))
    given = spec(SYS)
    given = msgspec.structs.replace(given, process=msgspec.structs.replace(given.process, capabilities=caps))
    assert is_privileged(given)
    assert strip(given).linux.resources == oci.Resources(devices=(ALL_DEVICES,))
    for held_back in (
        msgspec.structs.replace(given, mounts=(msgspec.structs.replace(SYS, options=("ro",)),)),
        msgspec.structs.replace(given, linux=oci.Linux(masked_paths=("/proc/kcore",))),
        msgspec.structs.replace(given, linux=oci.Linux(readonly_paths=("/proc/sys",))),
        msgspec.structs.replace(given, linux=oci.Linux(seccomp=oci.Seccomp(default_action="SCMP_ACT_ALLOW"))),
        spec(SYS),
    ):
        assert not is_privileged(held_back)


def test_run_asks_for_all_devices_with_privileged_only() -> None:
    for privileged in (False, True):
        options = ContainerOptions(args=("sh",), privileged=privileged)
        assert is_privileged(plan_container_spec(ProcessDefaults(), options, "/host/root")) is privileged


@pytest.mark.parametrize(
    ("given", "guest"),
    [
        (("rbind", "ro"), ("rbind", "ro")),
        (("ro", "rro", "rbind"), ("rbind", "ro")),
        (("rbind", "ro", "rrw", "nosuid"), ("rbind", "nosuid", "rw")),
    ],
)
def test_recursive_access_of_a_bind_mount_is_the_hosts_to_see_to(
    given: tuple[str, ...], guest: tuple[str, ...]
) -> None:
    mount = oci.Mount(destination="/data", type="bind", source="/host/data", options=given)
    assert strip(spec(mount), data="/share/data").mounts[0].options == guest


def test_namespaces() -> None:
    kinds = ("pid", "network", "ipc", "uts", "mount", "cgroup", "time", "user")
    given = spec(namespaces=tuple(oci.Namespace(type=kind, path=f"/proc/1/ns/{kind}") for kind in kinds))
    assert strip(given).linux.namespaces == tuple(oci.Namespace(type=kind) for kind in ("ipc", "uts", "mount", "user"))
    assert shares_pid_namespace(given)
    assert not shares_pid_namespace(spec(namespaces=(oci.Namespace(type="pid"),)))
    assert not shares_pid_namespace(spec())


def test_vfio_devices_stay_on_the_host() -> None:
    devices = (oci.Device(path="/dev/vfio/12", type="c"), oci.Device(path="/dev/fuse", type="c"))
    assert strip(spec(devices=devices)).linux.devices == devices[1:]


def test_mount_sources_become_guest_paths() -> None:
    proc = oci.Mount(destination="/proc", type="proc", source="proc")
    found = strip(
        spec(
            proc,
            oci.Mount(destination="/data", type="bind", source="/host/data", options=("rbind", "ro")),
            oci.Mount(destination="/shm", type="tmpfs", source="shm", options=("size=1m",)),
        ),
        data="/share/data",
        shm=SHM,
    )
    assert found.mounts == (
        proc,
        oci.Mount(destination="/data", type="bind", source="/share/data", options=("rbind", "ro")),
        oci.Mount(destination="/shm", type="bind", source=SHM, options=("rbind",)),
    )


@pytest.mark.parametrize("kind", [{"type": "bind"}, {"options": ("rbind",)}, {"type": "none", "options": ("bind",)}])
def test_a_bind_mount_without_a_guest_path_is_refused(kind: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="cannot mount /host on /data: it is not shared with the guest"):
        strip(spec(oci.Mount(destination="/data", source="/host", **kind)))


@pytest.mark.parametrize("kind", ["overlay", "ext4", "nfs", "fuse.sshfs"])
def test_a_file_system_of_the_host_is_no_mount_of_the_guest(kind: str) -> None:
    given = oci.Mount(destination="/data", type=kind, source="x", options=("lowerdir=/host/a:/host/b", "ro", "nodev"))
    with pytest.raises(SpecError, match="cannot mount x on /data: it is not shared with the guest"):
        strip(spec(given))
    (found,) = strip(spec(given), data="/share/data").mounts
    assert found == oci.Mount(destination="/data", type="bind", source="/share/data", options=("rbind", "ro", "nodev"))


def test_mapping_and_mounts_must_match_one_to_one() -> None:
    data = oci.Mount(destination="/data", type="bind", source="/host")
    with pytest.raises(SpecError, match="cannot mount on /data: two mounts"):
        strip(spec(data, data), data="/g")
    with pytest.raises(SpecError, match="cannot mount on /other: the container has no such mount"):
        strip(spec(data), data="/g", other="/g")


def test_no_host_path_is_left_in_a_planned_container() -> None:
    host = "/srv/secret-host-path"
    options = ContainerOptions(volumes=(Volume(source=host, destination="/data"),), annotations={})
    planned = plan_container_spec(ProcessDefaults(cmd=("sh",)), options, host + "/root")
    found = strip(planned, data="/share/data")
    assert host not in oci.encode_spec(found).decode()
    assert oci.parse_spec(oci.encode_spec(found)) == found


def test_a_mount_that_becomes_a_bind_keeps_its_flags() -> None:
    shm = oci.Mount(destination="/shm", type="tmpfs", source="shm", options=("nosuid", "nodev", "noexec", "size=1m"))
    assert strip(spec(shm), shm=SHM).mounts[0].options == ("rbind", "nosuid", "nodev", "noexec")


def test_a_mount_that_a_later_one_hides_is_left_out() -> None:
    usual = oci.Mount(destination="/dev/shm", type="tmpfs", source="shm")
    other = oci.Mount(destination="/data", type="bind", source="/srv", options=("rbind",))
    own = oci.Mount(destination="/dev/shm/", type="bind", source="/run/pod/shm", options=("rbind",))
    assert visible_mounts((usual, other, own)) == (other, own)
    assert visible_mounts((usual, other)) == (usual, other)


def test_a_privileged_container_gets_no_devices_of_the_host() -> None:
    disk = oci.Device(path="/dev/vda", type="b", major=254)
    memory = oci.Device(path="/dev/mem", type="c", major=1, minor=1)
    spec = oci.Spec(oci_version="1.0.2", process=oci.Process(args=("true",), cwd="/"), root=oci.Root(path="/r"))
    asked = msgspec.structs.replace(spec, linux=oci.Linux(devices=(disk,)))
    everything = msgspec.structs.replace(spec, linux=oci.Linux(devices=(memory, disk)))
    assert without_host_devices(asked) is asked
    assert without_host_devices(everything).linux.devices == ()
