"""RuntimeClasses as profiles: handlers with drop-ins, overhead that nodes have measured; and what is refused."""

import json
from typing import Any

import msgspec
import pytest
from cluster_helper import REMOVED, FakeCluster, installed
from hypothesis import given
from hypothesis import strategies as st

from katapod.model.kataconfig import RuntimeClassSpec, Selector, Spec
from katapod.operator.cluster.quantities import same
from katapod.operator.cluster.validation import problems_of
from katapod.operator.report import Measured, Report

BIG = "[hypervisor.qemu]\ndefault_memory = 1024\n"


@pytest.fixture
def cluster() -> FakeCluster:
    found = FakeCluster()
    found.add_nodes("a", "b", "c")
    return found


def asked(cluster: FakeCluster) -> dict[str, Any]:
    """What the last job is told beside its target."""
    body = list(cluster.jobs.values())[-1]
    command = body["spec"]["template"]["spec"]["containers"][0]["command"]
    return json.loads(command[command.index("--settings") + 1]) if "--settings" in command else {}


def works(cluster: FakeCluster, **more: Any) -> Any:
    """An outcome of jobs: each node has the handlers that it was asked for."""

    def outcome(action: str, node: str) -> Report:
        if action == "uninstall":
            return REMOVED
        body = next(j for j in cluster.jobs.values() if j["metadata"]["annotations"]["katapod.io/node"] == node)
        command = body["spec"]["template"]["spec"]["containers"][0]["command"]
        text = command[command.index("--settings") + 1] if "--settings" in command else '{"handlers":[{"name":"kata"}]}'
        names = tuple(one["name"] for one in json.loads(text)["handlers"])
        return msgspec.structs.replace(installed(), handlers=names, **more)

    return outcome


def test_a_class_with_a_configuration_has_a_handler_of_its_own(cluster: FakeCluster) -> None:
    cluster.apply(runtimeClasses=[{"name": "kata"}, {"name": "kata-big", "configuration": BIG}])
    cluster.settle()
    assert asked(cluster) == {"handlers": [{"name": "kata"}, {"name": "kata-big", "dropIns": [BIG]}]}
    cluster.run(works(cluster))
    assert cluster.classes["kata-big"]["handler"] == "kata-big"
    assert cluster.classes["kata-big"]["scheduling"]["nodeSelector"] == {
        "katapod.io/runtime": "ready",
        "handler.katapod.io/kata-big": "ready",
    }
    assert cluster.nodes["a"]["metadata"]["labels"]["handler.katapod.io/kata-big"] == "ready"
    assert cluster.phases() == dict.fromkeys("abc", "Ready")


def test_a_changed_drop_in_is_rolled_out_and_taken_back(cluster: FakeCluster) -> None:
    cluster.apply()
    cluster.run(works(cluster))
    first = {name: node["metadata"]["annotations"]["katapod.io/record"] for name, node in cluster.nodes.items()}
    cluster.apply(configuration=BIG)
    cluster.settle()
    assert cluster.made[3:] == ["install a"], "the first node alone"
    assert {node["metadata"]["labels"]["katapod.io/runtime"] for node in cluster.nodes.values()} == {"ready"}
    cluster.run(works(cluster))
    assert cluster.made[3:] == ["install a", "install b", "install c"]
    assert asked_of_record(cluster, "a") != asked_of_record_text(first["a"])
    cluster.apply()
    cluster.run(works(cluster))
    assert len(cluster.made) == 9
    assert asked_of_record(cluster, "a") == "1"
    assert cluster.run(works(cluster)).changes == ()


def asked_of_record(cluster: FakeCluster, node: str) -> str:
    return asked_of_record_text(cluster.nodes[node]["metadata"]["annotations"]["katapod.io/record"])


def asked_of_record_text(text: str) -> str:
    return str(json.loads(text)["target"])


def test_a_node_that_fails_with_a_drop_in_keeps_what_it_had(cluster: FakeCluster) -> None:
    cluster.apply()
    cluster.run(works(cluster))
    cluster.apply(configuration=BIG)
    cluster.settle()
    cluster.end_job("a", Report(action="install", ok=False, target="1", stage="proof", message="no memory"))
    cluster.settle()
    assert cluster.phases() == {"a": "FailedToInstall", "b": "WaitingToInstall", "c": "WaitingToInstall"}
    assert cluster.nodes["a"]["metadata"]["labels"]["katapod.io/runtime"] == "ready"
    cluster.apply()
    cluster.settle()
    assert cluster.phases() == dict.fromkeys("abc", "Ready"), "it has that configuration still"


def test_a_handler_stays_while_a_pod_needs_it(cluster: FakeCluster) -> None:
    cluster.apply(runtimeClasses=[{"name": "kata"}, {"name": "kata-big", "configuration": BIG}])
    cluster.run(works(cluster))
    cluster.use("b", "kata-big")
    cluster.apply(runtimeClasses=[{"name": "kata"}])
    cluster.settle()
    assert asked(cluster)["handlers"][1] == {"name": "kata-big", "kept": True}
    cluster.run(works(cluster))
    assert cluster.classes["kata-big"]["scheduling"]["nodeSelector"]["katapod.io/runtime"] == "closed"
    cluster.users.clear()
    cluster.run(works(cluster))
    assert "kata-big" not in cluster.classes
    assert asked_of_record(cluster, "b") == "1"
    assert "handler.katapod.io/kata-big" not in cluster.nodes["b"]["metadata"]["labels"]


def test_a_class_gets_another_handler_when_no_pod_has_it(cluster: FakeCluster) -> None:
    cluster.apply(runtimeClasses=[{"name": "kata"}])
    cluster.run(works(cluster))
    cluster.use("a")
    cluster.apply(runtimeClasses=[{"name": "kata", "handler": "other"}])
    cluster.run(works(cluster))
    assert cluster.classes["kata"]["handler"] == "kata"
    assert cluster.classes["kata"]["scheduling"]["nodeSelector"]["katapod.io/runtime"] == "closed"
    cluster.users.clear()
    cluster.run(works(cluster))
    assert cluster.classes["kata"]["handler"] == "other"
    assert cluster.run(works(cluster)).changes == ()


def test_an_overhead_is_the_most_that_a_node_has_measured(cluster: FakeCluster) -> None:
    cluster.apply(runtimeClasses=[{"name": "kata", "overhead": {"mode": "measured", "cpu": "1", "memory": "1Gi"}}])
    cluster.settle()
    assert asked(cluster) == {"handlers": [{"name": "kata", "measure": True}]}
    assert cluster.classes == {}
    costs = {"a": Measured(120, 40), "b": Measured(310, 20), "c": Measured(90, 60)}

    def outcome(action: str, node: str) -> Report:
        return msgspec.structs.replace(installed(), measured={"kata": costs[node]})

    cluster.end_job("a", outcome("install", "a"))
    cluster.settle()
    assert cluster.classes["kata"]["overhead"] == {"podFixed": {"cpu": "40m", "memory": "120Mi"}}
    cluster.run(outcome)
    assert cluster.classes["kata"]["overhead"] == {"podFixed": {"cpu": "60m", "memory": "310Mi"}}


def test_a_fixed_overhead_is_compared_by_its_amount(cluster: FakeCluster) -> None:
    """The API server writes 1024Mi as 1Gi: that is no reason to write it again and again."""
    cluster.apply(runtimeClasses=[{"name": "kata", "overhead": {"cpu": "1000m", "memory": "1024Mi"}}])
    cluster.run(works(cluster))
    cluster.classes["kata"]["overhead"]["podFixed"] = {"cpu": "1", "memory": "1Gi"}
    assert cluster.step().changes == ()


@given(st.integers(0, 10**6), st.sampled_from(["Ki", "Mi", "Gi"]))
def test_amounts_are_told_apart(number: int, unit: str) -> None:
    factor = {"Ki": 1024, "Mi": 1024**2, "Gi": 1024**3}[unit]
    assert same({"memory": f"{number}{unit}"}, {"memory": str(number * factor)})
    assert not same({"memory": f"{number}{unit}"}, {"memory": f"{number + 1}{unit}"})
    assert not same({"memory": "1"}, {"cpu": "1"})


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (
            {"configuration": "[hypervisor.qemu]\nx = 1\ndefault_memroy = 5\n"},
            "spec.configuration:3: [hypervisor.qemu] default_memroy: unknown key; did you mean default_memory?",
        ),
        (
            {"runtimeClasses": [{"name": "a"}, {"name": "b", "configuration": "[runtime]\nsandbox_cgroup_only = 3\n"}]},
            "spec.runtimeClasses[1].configuration:2: [runtime] sandbox_cgroup_only: expected bool, got int 3",
        ),
        ({"configuration": "[hypervisor"}, "cannot parse spec.configuration: it is not TOML"),
        (
            {
                "runtimeClasses": [
                    {"name": "a", "handler": "h", "configuration": BIG},
                    {"name": "b", "handler": "h"},
                ]
            },
            "spec.runtimeClasses[1].configuration: it is not that of spec.runtimeClasses[0].configuration",
        ),
        (
            {"kataConfigPoolSelector": {"matchLabels": {"a b": "c"}}},
            "spec.kataConfigPoolSelector.matchLabels: 'a b' is no key of a label",
        ),
        (
            {"kataConfigPoolSelector": {"matchExpressions": [{"key": "/a", "operator": "Exists"}]}},
            "spec.kataConfigPoolSelector.matchExpressions[0].key: '/a' is no key of a label",
        ),
        (
            {"kataConfigPoolSelector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}},
            "spec.kataConfigPoolSelector.matchExpressions[0].values: Exists takes none",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_path(cluster: FakeCluster, spec: dict[str, Any], problem: str) -> None:
    cluster.apply(**spec)
    cluster.settle()
    told = cluster.condition("Degraded")
    assert (told["status"], told["reason"]) == ("True", "Invalid")
    assert problem in told["message"]
    assert cluster.made == []


def test_what_no_job_could_carry_is_refused() -> None:
    many = tuple(RuntimeClassSpec(f"k{number}", configuration=BIG) for number in range(17))
    assert problems_of(Spec(runtime_classes=many[:16])) == ()
    assert "17 handlers, and a node can have 16" in problems_of(Spec(runtime_classes=many))[0]
    spec = Spec(runtime_classes=many[:16], configuration="# long\n" * 2000)
    assert "bytes of configuration, and 100000 is the most" in problems_of(spec)[0]


def test_all_that_is_wrong_is_said_at_once() -> None:
    spec = Spec(Selector({"a b": "c"}), configuration="[runtime]\nx = 1\n")
    assert len(problems_of(spec)) == 2


@pytest.mark.parametrize("key", ["a", "a.b/c", "kubernetes.io/os", "A_b-c.d", "x" * 63, "a" * 253 + "/b"])
def test_keys_of_labels(key: str) -> None:
    assert problems_of(Spec(Selector({key: ""}))) == ()


def test_an_upgrade_drains_where_it_is_asked_to(cluster: FakeCluster) -> None:
    cluster.apply(rollout={"drain": True})
    cluster.run(works(cluster))
    assert cluster.made == ["install a", "install b", "install c"], "nothing is drained for a first installation"
    cluster.use("a")
    cluster.use("b")
    cluster.refused = {"default/pod0": "it would violate the pod's disruption budget"}
    cluster.settings = upgraded(cluster)
    cluster.step()
    assert cluster.nodes["a"]["spec"] == {"unschedulable": True}
    for _ in range(3):
        cluster.step()
    assert cluster.phases()["a"] == "Draining"
    assert len(cluster.made) == 3, "no job while a pod is there"
    assert len(cluster.users) == 2, "others are left alone"
    blocked = cluster.condition("Blocked")
    assert (blocked["status"], blocked["reason"]) == ("True", "EvictionRefused")
    assert "default/pod0 (it would violate" in blocked["message"]
    cluster.refused = {}
    cluster.settle()
    assert cluster.made[3:] == ["install a"]
    assert cluster.nodes["a"]["spec"] == {"unschedulable": True}
    cluster.run(works(cluster, target="2"))
    assert cluster.phases() == dict.fromkeys("abc", "Ready")
    assert [node.get("spec") for node in cluster.nodes.values()] == [{}, {}, {}]
    assert cluster.users == []


def upgraded(cluster: FakeCluster) -> Any:
    return msgspec.structs.replace(cluster.settings, target="2", image="katapod.io/node:2")


def test_a_node_that_fails_after_a_drain_takes_pods_again(cluster: FakeCluster) -> None:
    cluster.apply(rollout={"drain": True})
    cluster.run(works(cluster))
    cluster.settings = upgraded(cluster)
    cluster.settle()
    assert cluster.nodes["a"]["spec"] == {"unschedulable": True}
    cluster.end_job("a", Report(action="install", ok=False, target="2", stage="proof", message="no"))
    cluster.settle()
    assert cluster.nodes["a"]["spec"] == {}
    assert cluster.phases()["a"] == "FailedToInstall"
    assert cluster.made[3:] == ["install a"]


def test_a_node_that_was_cordoned_before_stays_so(cluster: FakeCluster) -> None:
    cluster.apply(rollout={"drain": True})
    cluster.run(works(cluster))
    cluster.nodes["b"]["spec"] = {"unschedulable": True}
    cluster.settings = upgraded(cluster)
    cluster.run(works(cluster))
    assert cluster.nodes["b"]["spec"] == {"unschedulable": True}
    assert cluster.nodes["a"]["spec"] == {}


@pytest.mark.parametrize("way", ["delete", "unchoose", "force"])
def test_a_drain_that_is_given_up_leaves_no_cordon(cluster: FakeCluster, way: str) -> None:
    cluster.apply(rollout={"drain": True})
    cluster.run(works(cluster))
    cluster.use("a")
    cluster.refused = {"default/pod0": "no"}
    cluster.settings = upgraded(cluster)
    for _ in range(4):
        cluster.step()
    assert cluster.phases()["a"] == "Draining"
    if way == "unchoose":
        cluster.apply(kataConfigPoolSelector={"matchLabels": {"no": "node"}})
    else:
        cluster.delete()
    if way == "force":
        assert cluster.config is not None
        cluster.config["metadata"]["annotations"] = {"katapod.io/force-delete": "true"}
    cluster.settle()
    assert cluster.nodes["a"]["spec"] == {}
    cluster.users.clear()
    cluster.run(works(cluster))
    assert all("katapod.io/record" not in node["metadata"]["annotations"] for node in cluster.nodes.values())


def test_pods_of_daemons_are_not_waited_for(cluster: FakeCluster) -> None:
    cluster.apply(rollout={"drain": True})
    cluster.run(works(cluster))
    cluster.use("a")
    cluster.users[0]["metadata"]["ownerReferences"] = [{"kind": "DaemonSet", "controller": True}]
    cluster.settings = upgraded(cluster)
    cluster.run(works(cluster))
    assert cluster.phases() == dict.fromkeys("abc", "Ready")
    assert len(cluster.users) == 1


def test_the_status_of_many_nodes_is_bounded() -> None:
    cluster = FakeCluster()
    cluster.add_nodes(*(f"node-{number:04}" for number in range(120)))
    cluster.apply(rollout={"maxUnavailable": 400})
    cluster.run(
        lambda action, node: installed() if node != "node-0119" else Report(action="install", ok=False, target="1")
    )
    assert cluster.config is not None
    status = cluster.config["status"]
    assert status["kataNodes"]["nodeCount"] == 120
    assert status["kataNodes"]["readyNodeCount"] == 119
    assert len(status["kataNodes"]["installed"]) == 100
    assert len(status["nodes"]) == 50
    assert status["nodesOmitted"] == 70
    assert status["nodes"][-1]["phase"] == "FailedToInstall"
    assert len(json.dumps(status)) < 40_000
