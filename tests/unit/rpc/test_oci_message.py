"""Specs as messages: over the wire, and back by the agent's own reader."""

import json
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from katapod.agent import spec as agent_spec
from katapod.model import oci
from katapod.model.mount_flags import Volume
from katapod.model.seccomp_profile import ProfileArg, Rule, SeccompProfile
from katapod.plan.container_spec import ContainerOptions, ProcessDefaults, plan_container_spec
from katapod.plan.guest_spec import strip_for_guest
from katapod.plan.seccomp import GuestKernel
from katapod.rpc import oci_message
from katapod.rpc.features import CPU_BURST, CPU_IDLE, PERSONALITY, SECCOMP_DEFAULT_ERRNO, UMASK, UNIFIED
from katapod.rpc.oci_message import features_needed, process_to_message, resources_to_message, spec_to_message
from katapod.rpc.pb import oci_pb2


def minimal(**linux: Any) -> oci.Spec:
    return oci.Spec(
        oci_version="1.0.2",
        process=oci.Process(args=("sh",), cwd="/"),
        root=oci.Root(path="/r"),
        linux=oci.Linux(**linux),
    )


def over_the_wire(spec: oci.Spec) -> oci_pb2.Spec:
    return oci_pb2.Spec.FromString(spec_to_message(spec).SerializeToString())


def test_the_table_names_every_field_of_both_sides() -> None:
    """A field added to the model or to the protocol, but not to the table, must not be lost in silence."""
    not_modelled = {"Spec": {"Solaris", "Windows"}, "User": {"Username"}}
    not_sent: dict[type[msgspec.Struct], set[str]] = {
        oci.Spec: {"domainname"},  # a sysctl
        oci.Process: {"scheduler", "io_priority"},  # these and all below are refused
        oci.Mount: {"uid_mappings", "gid_mappings"},
        oci.Linux: {"time_offsets", "net_devices"},
        oci.Seccomp: {"listener_path", "listener_metadata"},
    }
    special: dict[type[msgspec.Struct], str] = {
        oci.Rlimit: "POSIXRlimit",
        oci.IdMapping: "LinuxIDMapping",
        oci.Cpu: "LinuxCPU",
    }
    assert len(oci_message._FIELDS) == len([n for n in oci.__all__ if isinstance(getattr(oci, n), type)])
    for kind, table in oci_message._FIELDS.items():
        name = special.get(kind, f"Linux{kind.__name__}")
        name = name if hasattr(oci_pb2, name) else kind.__name__
        assert set(table) == set(kind.__struct_fields__) - not_sent.get(kind, set())
        fields = {field.name for field in getattr(oci_pb2, name).DESCRIPTOR.fields}
        assert set(table.values()) == fields - not_modelled.get(name, set())


def test_a_container_as_it_is_planned_arrives_in_crun_config() -> None:
    options = ContainerOptions(
        hostname="web",
        memory_bytes=64 << 20,
        cpus=1.5,
        pids_limit=7,
        tty=True,
        console_size=oci.Box(height=24, width=80),
        volumes=(Volume(source="/h", destination="/mit Leerzeichen/ü", read_only=True),),
        ulimits=(oci.Rlimit(type="RLIMIT_CORE", soft=0, hard=2**64 - 1),),
        seccomp=SeccompProfile(
            default_action="SCMP_ACT_ALLOW",
            syscalls=(
                Rule(names=("mkdir",), action="SCMP_ACT_ERRNO", errno_ret=0),
                Rule(
                    names=("personality",),
                    action="SCMP_ACT_ERRNO",
                    args=(ProfileArg(index=0, value=2**64 - 1, op="SCMP_CMP_EQ"),),
                ),
            ),
        ),
    )
    kernel = GuestKernel("x86_64")
    planned = plan_container_spec(ProcessDefaults(cmd=("sh",), env=("Ü=ä",)), options, "/host", kernel)
    sent = strip_for_guest(
        planned, root_path="/g", mount_sources={"/mit Leerzeichen/ü": "/share/x"}, guest_seccomp=True
    )
    raw = agent_spec.spec_json(over_the_wire(sent), "/g", "/c1", {})
    got = oci.parse_spec(json.dumps(raw).encode())
    assert got.process == msgspec.structs.replace(sent.process, oom_score_adj=0)
    assert got.mounts == sent.mounts
    assert got.hostname == "web"
    assert (got.memory_limit, got.cpu_limit) == (64 << 20, 1.5)
    assert got.linux.seccomp == sent.linux.seccomp
    assert got.linux.resources is not None
    assert got.linux.resources.pids == oci.Pids(limit=7)
    assert got.linux.masked_paths == sent.linux.masked_paths


def test_presence_of_empty_parts_and_of_errno_is_kept() -> None:
    message = over_the_wire(minimal(seccomp=oci.Seccomp(default_action="")))
    assert message.Linux.HasField("Seccomp")
    assert not over_the_wire(minimal()).Linux.HasField("Seccomp")
    assert not message.Process.HasField("Capabilities")
    calls = (
        oci.Syscall(names=("a",), action="x", errno_ret=0),
        oci.Syscall(names=("b",), action="x"),
    )
    message = over_the_wire(minimal(seccomp=oci.Seccomp(default_action="y", syscalls=calls)))
    assert [call.HasField("errnoret") for call in message.Linux.Seccomp.Syscalls] == [True, False]


def test_fields_of_our_own_arrive_and_name_what_the_agent_must_know() -> None:
    filters = {number: oci.Seccomp(default_action="SCMP_ACT_ERRNO", default_errno_ret=number) for number in (38, 1, 0)}
    for number, needed in ((38, {SECCOMP_DEFAULT_ERRNO}), (1, set()), (0, {SECCOMP_DEFAULT_ERRNO})):
        message = over_the_wire(minimal(seccomp=filters[number]))
        assert agent_spec.spec_json(message, "/r", "/c", {})["linux"]["seccomp"]["defaultErrnoRet"] == number
        assert features_needed(message.Process, message.Linux) == needed
    without = over_the_wire(minimal(seccomp=oci.Seccomp(default_action="SCMP_ACT_ERRNO")))
    assert "defaultErrnoRet" not in agent_spec.spec_json(without, "/r", "/c", {})["linux"]["seccomp"]
    for umask, needed in ((0o77, {UMASK}), (0, {UMASK}), (0o22, set()), (msgspec.UNSET, set())):
        process = process_to_message(oci.Process(args=("sh",), cwd="/", user=oci.User(umask=umask)))
        assert agent_spec.process_json(process)["user"].get("umask", msgspec.UNSET) == umask
        assert features_needed(process) == needed


def test_more_of_linux_arrives_in_fields_of_our_own() -> None:
    sent = minimal(
        personality=oci.Personality(domain="LINUX32"),
        resources=oci.Resources(
            cpu=oci.Cpu(quota=5, period=10, burst=3, idle=1), unified={"memory.oom.group": "1", "pids.max": "max"}
        ),
    )
    message = over_the_wire(sent)
    got = oci.parse_spec(json.dumps(agent_spec.spec_json(message, "/r", "/c", {})).encode())
    assert got.linux.personality == sent.linux.personality
    assert got.linux.resources is not None
    assert sent.linux.resources is not None
    assert got.linux.resources.cpu == sent.linux.resources.cpu
    assert got.linux.resources.unified == sent.linux.resources.unified
    assert features_needed(message.Process, message.Linux) == {PERSONALITY, UNIFIED, CPU_BURST, CPU_IDLE}


def text() -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=50)
@given(
    args=st.lists(text(), min_size=1, max_size=4),
    env=st.lists(text(), max_size=4),
    cwd=text().map("/".__add__),
    uid=st.integers(0, 2**32 - 1),
    gids=st.lists(st.integers(0, 2**32 - 1), max_size=3),
    terminal=st.booleans(),
    limits=st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=2),
    oom=st.integers(-1000, 1000),
)
def test_any_process_comes_back_equal(
    args: list[str],
    env: list[str],
    cwd: str,
    uid: int,
    gids: list[int],
    terminal: bool,
    limits: list[tuple[int, int]],
    oom: int,
) -> None:
    process = oci.Process(
        args=tuple(args),
        env=tuple(env),
        cwd=cwd,
        user=oci.User(uid=uid, gid=uid, additional_gids=tuple(gids)),
        terminal=terminal,
        rlimits=tuple(oci.Rlimit(type="RLIMIT_CPU", hard=hard, soft=soft) for hard, soft in limits),
        oom_score_adj=oom,
    )
    message = oci_pb2.Process.FromString(process_to_message(process).SerializeToString())
    assert msgspec.convert(agent_spec.process_json(message), type=oci.Process) == process


@settings(max_examples=50)
@given(
    limit=st.integers(-1, 2**63 - 1).filter(bool),
    quota=st.integers(1, 2**63 - 1),
    period=st.integers(1, 2**63),
    shares=st.integers(2, 262144),
    pids=st.integers(1, 2**22),
)
def test_any_resources_come_back_equal(limit: int, quota: int, period: int, shares: int, pids: int) -> None:
    resources = oci.Resources(
        memory=oci.Memory(limit=limit, swap=limit),
        cpu=oci.Cpu(quota=quota, period=period, shares=shares),
        pids=oci.Pids(limit=pids),
    )
    message = oci_pb2.LinuxResources.FromString(resources_to_message(resources).SerializeToString())
    assert msgspec.convert(agent_spec.resources_json(message), type=oci.Resources) == resources
