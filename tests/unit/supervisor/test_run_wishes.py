"""What `run` is asked for beside its container: devices, CPUs, images, ports, init programs, files."""

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from katapod.host.cpu_list import use_cpus
from katapod.host.init_program import find_init_program
from katapod.images import ImageNotFound, ImageStore
from katapod.model import oci
from katapod.model.errors import MissingProgram, NotFound, UsageError
from katapod.model.mount_flags import DeviceRequest, Volume
from katapod.plan.attachment import resolv_conf
from katapod.plan.container_spec import INIT_PATH, ContainerOptions, ProcessDefaults, plan_container_spec
from katapod.supervisor.host_devices import disks_among, with_host_devices
from katapod.supervisor.image_policy import bring_in
from katapod.supervisor.run_extras import write_cid_file
from katapod.supervisor.run_request import ImagePolicy, RunRequest


def planned(options: ContainerOptions) -> oci.Spec:
    return plan_container_spec(ProcessDefaults(cmd=("sh",)), options, "/root")


def test_an_init_program_runs_the_command() -> None:
    spec = planned(ContainerOptions(init_program="/usr/bin/tini-static", args=("sleep", "1")))
    assert spec.process.args == (INIT_PATH, "--", "sleep", "1")
    (mount,) = [each for each in spec.mounts if each.destination == INIT_PATH]
    assert (mount.source, "ro" in mount.options) == ("/usr/bin/tini-static", True)


def test_only_a_static_program_can_be_an_init(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    with pytest.raises(MissingProgram, match="no static init program"):
        find_init_program((str(script), "/bin/ls", str(tmp_path / "none")))
    assert find_init_program((str(script), "/bin/busybox")) == "/bin/busybox"


def test_limits_and_identity_reach_the_spec() -> None:
    spec = planned(
        ContainerOptions(
            cpus=0.5,
            cpu_period_us=50_000,
            memory_bytes=64 << 20,
            memory_reservation_bytes=32 << 20,
            oom_score_adj=100,
            umask=0o27,
            domainname="nis",
        )
    )
    resources = spec.linux.resources
    assert resources is not None
    assert resources.cpu == oci.Cpu(quota=25_000, period=50_000)
    assert resources.memory == oci.Memory(limit=64 << 20, swap=64 << 20, reservation=32 << 20)
    assert (spec.process.oom_score_adj, spec.process.user.umask, spec.domainname) == (100, 0o27, "nis")


def test_devices_of_the_guest_are_given_by_their_numbers() -> None:
    options = ContainerOptions(devices=(DeviceRequest(source="/dev/fuse", destination="/dev/f", access="rw"),))
    spec = with_host_devices(planned(options), options)
    assert spec.linux.devices == (oci.Device(path="/dev/f", type="c", major=10, minor=229, file_mode=0o666),)
    assert spec.linux.resources is not None
    assert spec.linux.resources.devices[-1] == oci.DeviceCgroup(allow=True, type="c", major=10, minor=229, access="rw")
    assert disks_among(options) == []


def test_character_devices_of_the_host_are_not_given(tmp_path: Path) -> None:
    for source, cause in (("/dev/tty", "no character device of the host"), (str(tmp_path / "none"), "No such file")):
        options = ContainerOptions(devices=(DeviceRequest(source=source, destination="/dev/x"),))
        with pytest.raises((UsageError, NotFound), match=cause):
            with_host_devices(planned(options), options)


def test_cpus_are_those_that_we_have() -> None:
    before = os.sched_getaffinity(0)
    one = min(before)
    try:
        use_cpus(frozenset({one}))
        assert os.sched_getaffinity(0) == {one}
        with pytest.raises(UsageError, match=r"cannot use --cpuset-cpus: this process has no CPU 4095"):
            use_cpus(frozenset({one, 4095}))
    finally:
        os.sched_setaffinity(0, before)


def test_a_cid_file_is_new(tmp_path: Path) -> None:
    write_cid_file(tmp_path / "cid", "c1")
    assert (tmp_path / "cid").read_text() == "c1"
    with pytest.raises(UsageError, match="it is there already"):
        write_cid_file(tmp_path / "cid", "c2")
    assert (tmp_path / "cid").read_text() == "c1"


def request(image: str, pull: str) -> RunRequest:
    plain = RunRequest("c1", image, None, None, ContainerOptions(), True, False, "", {}, None)  # type: ignore[arg-type]
    return replace(plain, image_policy=ImagePolicy(pull=pull))


async def test_what_a_registry_may_not_be_asked_for_is_not_there(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    with pytest.raises(ImageNotFound, match="--pull never forbids to ask its registry"):
        await bring_in(store, request("docker://registry.invalid/x:1", "never"), None)


@pytest.mark.parametrize("pull", ["missing", "always", "never"])
async def test_a_name_that_is_not_stored(tmp_path: Path, pull: str) -> None:
    """Without registries nobody is asked, and with --pull never neither."""
    registries = ("127.0.0.1:1",) if pull == "never" else ()
    with pytest.raises(ImageNotFound, match=r"cannot find image none:1: it is not in the store$"):
        await bring_in(ImageStore(tmp_path), request("none:1", pull), None, registries)


async def test_what_has_not_come_from_a_registry_cannot_be_pulled(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    with pytest.raises(UsageError, match="it has not come from a registry, but from host:busybox"):
        await bring_in(store, request("busybox", "always"), None)
    assert "busybox:latest" in (await bring_in(store, request("busybox", "missing"), None)).names


def test_search_domains_and_options_of_a_caller() -> None:
    host = "search host.example\noptions ndots:5\nnameserver 192.0.2.1\n"
    assert resolv_conf(host, (), search=("a.example", "b.example"), options=("ndots:2", "rotate")) == (
        "search a.example b.example\noptions ndots:2 rotate\nnameserver 192.0.2.1\n"
    )
    assert resolv_conf(host, (), search=("",)) == "options ndots:5\nnameserver 192.0.2.1\n"


def test_a_volume_s_source_is_a_mount() -> None:
    spec = planned(ContainerOptions(volumes=(Volume(source="/v/db/_data", destination="/d"),)))
    assert [each.source for each in spec.mounts if each.destination == "/d"] == ["/v/db/_data"]
