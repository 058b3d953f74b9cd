"""Of which pod a container is, and what the pod's limits add up to."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapod.model.annotations import ContainerKind, parse_annotations
from katapod.model.errors import SpecError
from katapod.model.sizing import ContainerLimits

CRI = {
    "io.kubernetes.cri.sandbox-id": "pod-1",
    "io.kubernetes.cri.sandbox-name": "web-0",
    "io.kubernetes.cri.sandbox-namespace": "shop",
    "io.kubernetes.cri.sandbox-uid": "3e9b",
}


def cri(kind: str, **more: str) -> dict[str, str]:
    return {"io.kubernetes.cri.container-type": kind} | CRI | more


def sizes(**values: str) -> dict[str, str]:
    return {f"io.kubernetes.cri.sandbox-{name.replace('_', '-')}": value for name, value in values.items()}


def test_no_annotations_is_a_container_of_its_own() -> None:
    found = parse_annotations({"io.katacontainers.config.x": "1"}, "c1")
    assert (found.kind, found.sandbox_id, found.pod_limits) == (ContainerKind.SINGLE, "c1", None)


def test_containerd_sandbox_is_its_own_id() -> None:
    found = parse_annotations(cri("sandbox"), "pod-1")
    assert (found.kind, found.sandbox_id) == (ContainerKind.SANDBOX, "pod-1")
    assert (found.pod_name, found.pod_namespace, found.pod_uid) == ("web-0", "shop", "3e9b")


def test_containerd_container() -> None:
    found = parse_annotations(cri("container", **{"io.kubernetes.cri.container-name": "nginx"}), "c1")
    assert (found.kind, found.sandbox_id, found.container_name) == (ContainerKind.CONTAINER, "pod-1", "nginx")


def test_crio() -> None:
    given_ = {
        "io.kubernetes.cri-o.ContainerType": "container",
        "io.kubernetes.cri-o.SandboxID": "pod-2",
        "io.kubernetes.cri-o.KubeName": "web-1",
        "io.kubernetes.cri-o.Namespace": "shop",
        "io.kubernetes.cri-o.ContainerName": "k8s_nginx",
    }
    found = parse_annotations(given_, "c2")
    assert (found.kind, found.sandbox_id, found.pod_name) == (ContainerKind.CONTAINER, "pod-2", "web-1")
    assert (found.pod_namespace, found.container_name) == ("shop", "k8s_nginx")


def test_dockershim() -> None:
    assert parse_annotations({"io.kubernetes.docker.type": "podsandbox"}, "p").kind is ContainerKind.SANDBOX
    found = parse_annotations({"io.kubernetes.docker.type": "container", "io.kubernetes.sandbox.id": "pod-3"}, "c")
    assert (found.kind, found.sandbox_id) == (ContainerKind.CONTAINER, "pod-3")


def test_containerds_keys_come_first() -> None:
    both = cri("container") | {"io.kubernetes.cri-o.ContainerType": "sandbox", "io.kubernetes.docker.type": "nonsense"}
    assert parse_annotations(both, "c").sandbox_id == "pod-1"


@pytest.mark.parametrize(
    ("annotations", "named"),
    [
        (cri("pod_sandbox"), "io.kubernetes.cri.container-type='pod_sandbox'"),
        (cri(""), "io.kubernetes.cri.container-type=''"),
        ({"io.kubernetes.docker.type": "sandbox"}, "io.kubernetes.docker.type='sandbox'"),
        ({"io.kubernetes.cri.container-type": "container"}, "io.kubernetes.cri.sandbox-id is absent"),
        (cri("container") | {"io.kubernetes.cri.sandbox-id": "../x"}, "io.kubernetes.cri.sandbox-id='../x'"),
        (cri("container") | {"io.kubernetes.cri.sandbox-id": "x" * 65}, "65 characters"),
        (cri("sandbox") | sizes(memory="64Mi"), "io.kubernetes.cri.sandbox-memory='64Mi'"),
        (cri("sandbox") | sizes(memory="1_0"), "'1_0'"),
        (cri("sandbox") | sizes(cpu_quota="1.5"), "io.kubernetes.cri.sandbox-cpu-quota='1.5'"),
        (cri("sandbox") | sizes(memory=str(2**63)), "64 bits"),
        (cri("sandbox") | sizes(memory="٣"), "decimal"),
    ],
)
def test_what_is_wrong_is_named(annotations: dict[str, str], named: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_annotations(annotations, "c1")
    assert named in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        ({}, None),
        ({"memory": "67108864"}, ContainerLimits(memory_bytes=64 << 20)),
        ({"cpu_quota": "150000", "cpu_period": "100000"}, ContainerLimits(cpus=1.5)),
        ({"cpu_quota": "50000"}, ContainerLimits(cpus=0.5)),
        ({"cpu_quota": "50000", "cpu_period": "0"}, ContainerLimits(cpus=0.5)),
        ({"cpu_quota": "0", "cpu_period": "100000", "cpu_shares": "2", "memory": "0"}, ContainerLimits()),
    ],
)
def test_sizes(values: dict[str, str], limits: ContainerLimits | None) -> None:
    assert parse_annotations(cri("sandbox") | sizes(**values), "pod-1").pod_limits == limits


@pytest.mark.parametrize(
    ("values", "cpus"),
    [
        ({"cpu_quota": "-1", "cpu_shares": "1500"}, 2),
        ({"cpu_quota": "0", "cpu_shares": "102"}, 1),
        ({"cpu_quota": "0", "cpu_shares": "2"}, 0),
        ({"cpu_quota": "50000", "cpu_shares": "4096"}, 0),
    ],
)
def test_shares_tell_what_is_asked_for_where_there_is_no_limit(values: dict[str, str], cpus: int) -> None:
    assert parse_annotations(cri("sandbox") | sizes(**values), "pod-1").pod_cpus_asked == cpus


KEYS = st.sampled_from(
    [*cri("x"), *sizes(memory="", cpu_quota="", cpu_period="", cpu_shares=""), "io.kubernetes.cri-o.ContainerType"]
)
VALUES: st.SearchStrategy[Any] = st.one_of(st.text(max_size=70), st.sampled_from(["sandbox", "container", "100"]))


@given(st.dictionaries(KEYS, VALUES))
def test_anything_is_a_value_or_a_spec_error(annotations: dict[str, str]) -> None:
    try:
        found = parse_annotations(annotations, "c1")
    except SpecError:
        return
    assert "/" not in found.sandbox_id
    assert found.pod_limits is None or (found.pod_limits.memory_bytes or 1) > 0
