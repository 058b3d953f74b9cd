"""From image and options to an OCI spec."""

from typing import Any

import pytest

from katapod.model import oci
from katapod.model.errors import UsageError
from katapod.model.flags import ALL_CAPABILITIES, UserName
from katapod.model.mount_flags import TmpfsMount, Volume
from katapod.model.seccomp_profile import SeccompProfile
from katapod.plan.container_spec import (
    DEFAULT_CAPABILITIES,
    DEFAULT_PATH,
    ContainerOptions,
    ProcessDefaults,
    effective_user,
    etc_files,
    plan_container_spec,
    plan_exec_process,
    with_etc_files,
)
from katapod.plan.seccomp import GuestKernel

SHELL = ProcessDefaults(cmd=("sh",))


def plan(image: ProcessDefaults = SHELL, **options: Any) -> oci.Spec:
    return plan_container_spec(image, ContainerOptions(**options), "/layers/c1", GuestKernel("x86_64"))


def mount(spec: oci.Spec, destination: str) -> oci.Mount:
    (found,) = [one for one in spec.mounts if one.destination == destination]
    return found


def test_a_plan_is_a_valid_spec() -> None:
    spec = plan(hostname="c1", memory_bytes=1 << 30, cpus=1.5, tty=True)
    assert oci.parse_spec(oci.encode_spec(spec)) == spec
    assert spec.root == oci.Root(path="/layers/c1")


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "override", "args", "expected"),
    [
        ((), ("sh",), None, (), ("sh",)),
        ((), ("sh",), None, ("id", "-u"), ("id", "-u")),
        (("ep",), (), None, (), ("ep",)),
        (("ep",), ("c",), None, (), ("ep", "c")),
        (("ep", "x"), ("c",), None, ("a",), ("ep", "x", "a")),
        (("ep",), ("c",), "other", (), ("other",)),
        (("ep",), ("c",), "other", ("a",), ("other", "a")),
        (("ep",), ("c",), "", ("a",), ("a",)),
        ((), (), "other", (), ("other",)),
    ],
)
def test_command(
    entrypoint: tuple[str, ...],
    cmd: tuple[str, ...],
    override: str | None,
    args: tuple[str, ...],
    expected: tuple[str, ...],
) -> None:
    image = ProcessDefaults(entrypoint=entrypoint, cmd=cmd)
    assert plan(image, entrypoint=override, args=args).process.args == expected


@pytest.mark.parametrize(
    ("image", "override"),
    [
        (ProcessDefaults(), None),
        (ProcessDefaults(entrypoint=("ep",), cmd=("c",)), ""),
        (ProcessDefaults(cmd=("",)), None),
    ],
)
def test_no_command(image: ProcessDefaults, override: str | None) -> None:
    with pytest.raises(UsageError, match="no command given and the image has none"):
        plan(image, entrypoint=override)


def test_environment_order_and_precedence() -> None:
    image = ProcessDefaults(cmd=("sh",), env=("PATH=/x", "A=image", "B=image"))
    spec = plan(image, hostname="h", tty=True, env=("A=mine", "C=1"))
    assert spec.process.env == ("PATH=/x", "HOSTNAME=h", "TERM=xterm", "A=mine", "B=image", "C=1")
    assert plan().process.env == (f"PATH={DEFAULT_PATH}",)


def test_working_directory() -> None:
    assert plan().process.cwd == "/"
    assert plan(ProcessDefaults(cmd=("sh",), cwd="/srv")).process.cwd == "/srv"
    assert plan(ProcessDefaults(cmd=("sh",), cwd="/srv"), cwd="/tmp").process.cwd == "/tmp"
    assert plan(ProcessDefaults(cmd=("sh",), cwd="srv")).process.cwd == "/srv"
    with pytest.raises(UsageError, match="'srv' as the working directory: it is not an absolute path"):
        plan(ProcessDefaults(cmd=("sh",)), cwd="srv")


def test_user_of_the_caller_then_of_the_image_then_root() -> None:
    image = ProcessDefaults(cmd=("sh",), user="1000:50")
    assert plan().process.user == oci.User(uid=0, gid=0)
    assert plan(image).process.user == oci.User(uid=1000, gid=50)
    assert plan(image, user=UserName(user="7")).process.user == oci.User(uid=7, gid=0)
    named = ContainerOptions(user=UserName(user="www-data", group="staff"))
    assert effective_user(image, named) == UserName(user="www-data", group="staff")
    assert effective_user(image, ContainerOptions()) == UserName(user="1000", group="50")


def capabilities(**options: Any) -> set[str]:
    found = plan(**options).process.capabilities
    assert found is not None
    assert found.effective == found.permitted == found.bounding
    assert found.inheritable == found.ambient == ()
    return set(found.bounding)


def test_capabilities() -> None:
    default = set(DEFAULT_CAPABILITIES)
    assert len(default) == 14
    assert capabilities() == default
    assert capabilities(cap_add=("CAP_NET_ADMIN",)) == default | {"CAP_NET_ADMIN"}
    assert capabilities(cap_drop=("CAP_CHOWN",)) == default - {"CAP_CHOWN"}
    assert capabilities(cap_drop=("ALL",)) == set()
    assert capabilities(cap_drop=("ALL",), cap_add=("CAP_KILL",)) == {"CAP_KILL"}
    assert capabilities(cap_add=("ALL",)) == set(ALL_CAPABILITIES)
    assert capabilities(cap_add=("ALL",), cap_drop=("CAP_KILL",)) == set(ALL_CAPABILITIES) - {"CAP_KILL"}
    assert capabilities(privileged=True, cap_drop=("ALL",)) == set(ALL_CAPABILITIES)


def test_another_user_than_root_has_the_bounding_set_only() -> None:
    found = plan(user=UserName(user="1000")).process.capabilities
    assert found is not None
    assert (set(found.bounding), found.effective, found.permitted) == (set(DEFAULT_CAPABILITIES), (), ())


def test_namespaces_leave_the_network_to_the_sandbox() -> None:
    assert [one.type for one in plan().linux.namespaces] == ["pid", "ipc", "uts", "mount"]


def test_usual_mounts() -> None:
    spec = plan()
    assert [one.destination for one in spec.mounts] == [
        "/proc",
        "/dev",
        "/dev/pts",
        "/sys",
        "/sys/fs/cgroup",
        "/dev/mqueue",
        "/dev/shm",
    ]
    assert "ro" in mount(spec, "/sys").options
    assert "ro" in mount(spec, "/sys/fs/cgroup").options
    assert "size=67108864" in mount(spec, "/dev/shm").options
    assert "size=1048576" in mount(plan(shm_bytes=1 << 20), "/dev/shm").options


def test_user_mounts_come_after_the_usual_ones_parents_first() -> None:
    spec = plan(
        volumes=(
            Volume(source="/a b", destination="/data/x/y", read_only=True),
            Volume(source="/ü", destination="/data"),
        ),
        tmpfs=(TmpfsMount(destination="/data/x", options=("noexec", "size=1m")),),
    )
    assert [one.destination for one in spec.mounts[-3:]] == ["/data", "/data/x", "/data/x/y"]
    assert mount(spec, "/data/x/y") == oci.Mount(
        destination="/data/x/y", type="bind", source="/a b", options=("rbind", "rprivate", "ro", "rro")
    )
    assert mount(spec, "/data").options == ("rbind", "rprivate", "rw")
    assert mount(spec, "/data/x") == oci.Mount(
        destination="/data/x", type="tmpfs", source="tmpfs", options=("noexec", "size=1m")
    )


def test_a_user_mount_takes_the_place_of_a_usual_one() -> None:
    spec = plan(volumes=(Volume(source="/big", destination="/dev/shm"),))
    assert mount(spec, "/dev/shm").source == "/big"


def test_two_mounts_on_one_destination() -> None:
    with pytest.raises(UsageError, match="cannot mount on /data: two mounts have this destination"):
        plan(
            volumes=(Volume(source="/a", destination="/data"),),
            tmpfs=(TmpfsMount(destination="/data", options=()),),
        )


def test_resources() -> None:
    spec = plan(memory_bytes=64 << 20, cpus=0.5, pids_limit=10)
    resources = spec.linux.resources
    assert resources is not None
    assert resources.memory == oci.Memory(limit=64 << 20, swap=64 << 20)
    assert resources.cpu == oci.Cpu(quota=50_000, period=100_000)
    assert resources.pids == oci.Pids(limit=10)
    assert (spec.memory_limit, spec.cpu_limit) == (64 << 20, 0.5)
    unlimited = plan().linux.resources
    assert unlimited is not None
    assert (unlimited.memory, unlimited.cpu, unlimited.pids) == (None, None, None)
    assert unlimited.devices[0] == oci.DeviceCgroup(allow=False, access="rwm")


def test_privileged_lifts_the_restrictions() -> None:
    profile = SeccompProfile(default_action="SCMP_ACT_ERRNO")
    usual, privileged = plan(seccomp=profile), plan(seccomp=profile, privileged=True)
    assert usual.linux.seccomp == oci.Seccomp(default_action="SCMP_ACT_ERRNO")
    assert privileged.linux.seccomp == usual.linux.seccomp, "who asks for a filter gets it"
    assert plan(privileged=True).linux.seccomp is None
    open_paths = plan(system_paths=True)
    assert open_paths.linux.masked_paths == open_paths.linux.readonly_paths == ()
    assert "/proc/kcore" in usual.linux.masked_paths
    assert "/proc/sys" in usual.linux.readonly_paths
    assert privileged.linux.masked_paths == privileged.linux.readonly_paths == ()
    assert "rw" in mount(privileged, "/sys").options
    assert privileged.linux.resources is not None
    assert privileged.linux.resources.devices == (oci.DeviceCgroup(allow=True, access="rwm"),)


def test_remaining_options_reach_the_spec() -> None:
    limit = oci.Rlimit(type="RLIMIT_NOFILE", hard=2, soft=1)
    spec = plan(
        read_only=True,
        hostname="web",
        ulimits=(limit,),
        sysctls={"kernel.shmmax": "1"},
        no_new_privileges=True,
        annotations={"a": "b"},
        cgroups_path="/k/c1",
        tty=True,
        console_size=oci.Box(height=24, width=80),
    )
    assert spec.root.readonly
    assert spec.hostname == "web"
    assert spec.process.rlimits == (limit,)
    assert spec.linux.sysctl == {"kernel.shmmax": "1"}
    assert spec.process.no_new_privileges
    assert spec.annotations == {"a": "b"}
    assert spec.linux.cgroups_path == "/k/c1"
    assert spec.process.terminal
    assert spec.process.console_size == oci.Box(height=24, width=80)
    assert plan(console_size=oci.Box(height=24, width=80)).process.console_size is None


def test_exec_inherits_from_the_container() -> None:
    spec = plan(env=("A=1",), cwd="/srv", no_new_privileges=True, user=UserName(user="5"))
    found = plan_exec_process(spec, ("id",), env=("A=2", "B=3"))
    assert found.args == ("id",)
    assert found.env == (f"PATH={DEFAULT_PATH}", "A=2", "B=3")
    assert (found.cwd, found.user.uid, found.terminal, found.no_new_privileges) == ("/srv", 5, False, True)
    other = plan_exec_process(spec, ("id",), cwd="/", user=oci.User(uid=0, gid=0), tty=True, privileged=True)
    assert other.capabilities is not None
    assert other.capabilities.effective == ALL_CAPABILITIES
    assert (other.cwd, other.terminal, other.no_new_privileges) == ("/", True, False)
    assert "TERM=xterm" in other.env


def test_exec_keeps_a_container_term_without_its_own() -> None:
    spec = plan(tty=True, env=("TERM=vt100",))
    assert "TERM=vt100" in plan_exec_process(spec, ("sh",), tty=True).env


@pytest.mark.parametrize(("args", "cwd"), [((), ""), (("",), ""), (("sh",), "srv")])
def test_bad_exec(args: tuple[str, ...], cwd: str) -> None:
    with pytest.raises(UsageError):
        plan_exec_process(plan(), args, cwd=cwd)


def test_etc_files_are_mounted_unless_the_caller_mounts_something_there() -> None:
    spec = plan_container_spec(ProcessDefaults(cmd=("sh",)), ContainerOptions(hostname="box"), "/root")
    added = {
        mount.destination: mount.source for mount in with_etc_files(spec, "/d").mounts if "etc" in mount.destination
    }
    assert added == {"/etc/hostname": "/d/hostname", "/etc/hosts": "/d/hosts"}
    volume = Volume(source="/srv/hosts", destination="/etc/hosts")
    spec = plan_container_spec(ProcessDefaults(cmd=("sh",)), ContainerOptions(volumes=(volume,)), "/root")
    sources = [mount.source for mount in with_etc_files(spec, "/d").mounts if mount.destination.startswith("/etc")]
    assert sources == ["/srv/hosts", "/d/hostname"]
    assert "127.0.0.1\tlocalhost" in etc_files("box")["hosts"]
    assert "\tbox\n" in etc_files("box")["hosts"]
