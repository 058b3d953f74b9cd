"""The operator's decisions, on a cluster of values: from a KataConfig to nodes, and back."""

import copy
import random

import pytest
from cluster_helper import REMOVED, FakeCluster, installed, refused
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from katapod.operator.report import Report


@pytest.fixture
def cluster() -> FakeCluster:
    found = FakeCluster()
    found.add_nodes("a", "b", "c")
    return found


def works(action: str, node: str) -> Report:
    return installed() if action == "install" else REMOVED


def test_all_nodes_get_it_and_lose_it_again(cluster: FakeCluster) -> None:
    before = copy.deepcopy(cluster.nodes)
    cluster.apply()
    cluster.run(works)
    assert cluster.phases() == {"a": "Ready", "b": "Ready", "c": "Ready"}
    assert cluster.made == ["install a", "install b", "install c"]
    assert cluster.condition("Ready")["status"] == "True"
    assert cluster.classes["kata"]["scheduling"] == {"nodeSelector": {"katapod.io/runtime": "ready"}}
    assert cluster.classes["kata"]["overhead"] == {"podFixed": {"cpu": "250m", "memory": "350Mi"}}
    assert {node["metadata"]["labels"]["katapod.io/accelerator"] for node in cluster.nodes.values()} == {"kvm"}
    cluster.delete()
    cluster.run(works)
    assert cluster.is_gone()
    assert (cluster.nodes, cluster.classes, cluster.jobs) == (before, {}, {})


def test_no_class_before_a_node_is_proven(cluster: FakeCluster) -> None:
    cluster.apply()
    cluster.settle()
    assert cluster.classes == {}
    cluster.end_job("a", installed())
    cluster.settle()
    assert set(cluster.classes) == {"kata", "kata-uml", "kata-tcg"}


def test_the_first_node_goes_alone(cluster: FakeCluster) -> None:
    cluster.apply(rollout={"maxUnavailable": 2})
    cluster.settle()
    assert cluster.made == ["install a"]
    cluster.end_job("a", installed())
    cluster.settle()
    assert cluster.made == ["install a", "install b", "install c"]


def test_a_failure_stops_the_others_and_is_tried_again(cluster: FakeCluster) -> None:
    cluster.apply()
    plan = cluster.run(lambda action, node: refused() if node == "a" else works(action, node))
    assert cluster.phases() == {"a": "FailedToInstall", "b": "WaitingToInstall", "c": "WaitingToInstall"}
    assert cluster.condition("Degraded")["message"] == "a: stage proof: it does not work"
    assert cluster.condition("Progressing")["reason"] == "Stopped"
    assert plan.wake is not None
    assert (plan.wake - cluster.now).total_seconds() == 60
    cluster.later(seconds=61)
    cluster.run(works)
    # the others have not failed yet, so one of them is the next canary
    assert cluster.made == ["install a", "install b", "install c", "install a"]
    assert cluster.condition("Degraded")["status"] == "False"


def test_what_fails_again_and_again_is_tried_more_seldom(cluster: FakeCluster) -> None:
    cluster.apply(kataConfigPoolSelector={"matchExpressions": [{"key": "no", "operator": "DoesNotExist"}]})
    del cluster.nodes["b"], cluster.nodes["c"]
    waits = []
    for _ in range(8):
        plan = cluster.run(lambda *_: refused())
        assert plan.wake is not None
        waits.append((plan.wake - cluster.now).total_seconds())
        cluster.now = plan.wake
    assert waits == [60, 120, 240, 480, 960, 1920, 3600, 3600]


def test_a_failure_is_told_in_full_while_its_job_is_removed(cluster: FakeCluster) -> None:
    cluster.apply()
    cluster.settle()
    cluster.end_job("a", refused())
    told = set()
    while cluster.step().changes:
        told.add(cluster.condition("Degraded")["message"])
    assert told == {"", "a: stage proof: it does not work"}


def test_paused_begins_with_no_node_and_ends_what_was_begun(cluster: FakeCluster) -> None:
    cluster.apply()
    cluster.settle()
    cluster.apply(rollout={"paused": True})
    cluster.end_job("a", installed())
    cluster.settle()
    assert cluster.phases()["a"] == "Ready"
    assert cluster.made == ["install a"]
    assert cluster.condition("Progressing")["reason"] == "Paused"


def test_a_job_without_a_report_leaves_a_node_to_be_cleaned(cluster: FakeCluster) -> None:
    cluster.apply()
    cluster.settle()
    cluster.end_job("a", "Killed")
    cluster.settle()
    assert cluster.condition("Degraded")["message"] == "a: stage job: Killed"
    cluster.delete()
    cluster.run(works)
    assert cluster.made == ["install a", "uninstall a"]
    assert cluster.is_gone()


def test_what_was_undone_needs_no_cleaning(cluster: FakeCluster) -> None:
    cluster.apply()
    cluster.settle()
    cluster.end_job("a", refused())
    cluster.settle()
    cluster.delete()
    cluster.run(works)
    assert cluster.made == ["install a"]
    assert cluster.is_gone()


def test_deletion_waits_for_pods_and_names_them(cluster: FakeCluster) -> None:
    cluster.apply()
    cluster.run(works)
    cluster.use("b")
    cluster.delete()
    cluster.settle()
    blocked = cluster.condition("Blocked")
    assert (blocked["status"], blocked["message"]) == ("True", "deletion waits for 1 pods: default/pod0")
    assert cluster.condition("InProgress")["reason"] == "BlockedByExistingKataPods"
    # closed to new pods, while the running one's node keeps what its selector needs when the kubelet looks again
    assert cluster.classes["kata"]["scheduling"] == {"nodeSelector": {"katapod.io/runtime": "closed"}}
    assert cluster.nodes["b"]["metadata"]["labels"]["katapod.io/runtime"] == "ready"
    assert not any(one.startswith("uninstall") for one in cluster.made)
    cluster.users[0]["status"]["phase"] = "Succeeded"
    cluster.run(works)
    assert cluster.is_gone()


def test_deletion_by_force_waits_for_nothing(cluster: FakeCluster) -> None:
    before = copy.deepcopy(cluster.nodes)
    cluster.apply()
    cluster.run(works)
    cluster.use("b")
    cluster.delete()
    assert cluster.config is not None
    cluster.config["metadata"]["annotations"] = {"katapod.io/force-delete": "true"}
    cluster.settle()
    assert cluster.is_gone()
    assert (cluster.nodes, cluster.classes) == (before, {})


def test_a_node_that_is_no_longer_chosen_waits_for_its_own_pods(cluster: FakeCluster) -> None:
    cluster.add_nodes("d", pool="kata")
    cluster.apply(kataConfigPoolSelector={"matchExpressions": [{"key": "out", "operator": "DoesNotExist"}]})
    cluster.run(works)
    cluster.use("a")
    for name in ("a", "b"):
        cluster.nodes[name]["metadata"]["labels"]["out"] = ""
    cluster.run(works)
    assert cluster.phases() == {"a": "WaitingToUninstall", "c": "Ready", "d": "Ready"}
    assert cluster.condition("Blocked")["message"] == "a waits for default/pod0"
    assert cluster.made[4:] == ["uninstall b"]
    assert "katapod.io/record" not in cluster.nodes["b"]["metadata"]["annotations"]
    cluster.users.clear()
    cluster.run(works)
    assert cluster.made[4:] == ["uninstall b", "uninstall a"]


def test_an_accelerator_that_is_no_longer_allowed(cluster: FakeCluster) -> None:
    cluster.apply()
    cluster.run(lambda action, node: installed("tcg" if node == "b" else "kvm") if action == "install" else REMOVED)
    cluster.apply(accelerators=["kvm"])
    cluster.run(lambda action, node: refused("image") if action == "install" else REMOVED)
    assert cluster.phases() == {"a": "Ready", "b": "FailedToInstall", "c": "Ready"}
    assert "katapod.io/runtime" not in cluster.nodes["b"]["metadata"]["labels"]


def test_promoted_only_when_the_kubelet_knows_the_handler(cluster: FakeCluster) -> None:
    status = cluster.nodes["a"]["status"]
    status["runtimeHandlers"] = [{"name": "runc"}]
    cluster.apply()
    cluster.run(works)
    assert cluster.phases()["a"] == "Settling"
    assert "katapod.io/runtime" not in cluster.nodes["a"]["metadata"]["labels"]
    status["runtimeHandlers"].append({"name": "kata"})
    cluster.settle()
    assert cluster.phases()["a"] == "Ready"


def test_a_node_that_disappears_takes_its_job_along(cluster: FakeCluster) -> None:
    cluster.apply()
    cluster.settle()
    del cluster.nodes["a"]
    cluster.run(works)
    assert cluster.phases() == {"b": "Ready", "c": "Ready"}
    assert cluster.jobs == {}


def test_a_label_without_a_proof_is_removed(cluster: FakeCluster) -> None:
    cluster.nodes["c"]["metadata"]["labels"]["katapod.io/runtime"] = "ready"
    cluster.apply()
    cluster.settle()
    assert "katapod.io/runtime" not in cluster.nodes["c"]["metadata"]["labels"]


def test_a_class_of_somebody_else_is_left_alone(cluster: FakeCluster) -> None:
    theirs = {"metadata": {"name": "kata"}, "handler": "other"}
    cluster.classes["kata"] = theirs
    cluster.apply()
    cluster.run(works)
    assert cluster.condition("Degraded")["reason"] == "RuntimeClassTaken"
    assert cluster.condition("Ready")["status"] == "False"
    cluster.delete()
    cluster.run(works)
    assert cluster.classes == {"kata": theirs}


def test_a_class_that_is_no_longer_wanted_waits_for_its_pods(cluster: FakeCluster) -> None:
    cluster.apply()
    cluster.run(works)
    cluster.use("a", "kata-uml")
    cluster.apply(runtimeClasses=[{"name": "kata", "overhead": {"memory": "500Mi"}}])
    cluster.settle()
    assert set(cluster.classes) == {"kata", "kata-uml"}
    assert cluster.classes["kata"]["overhead"] == {"podFixed": {"cpu": "250m", "memory": "500Mi"}}
    cluster.users.clear()
    cluster.settle()
    assert set(cluster.classes) == {"kata"}


def test_a_bad_selector_is_named_by_its_path(cluster: FakeCluster) -> None:
    cluster.apply(kataConfigPoolSelector={"matchExpressions": [{"key": "a", "operator": "In"}]})
    cluster.settle()
    told = cluster.condition("Degraded")
    assert told["message"] == "spec.kataConfigPoolSelector.matchExpressions[0].values: In needs at least one"
    assert cluster.made == []


def test_a_condition_keeps_its_time_until_it_changes(cluster: FakeCluster) -> None:
    cluster.apply()
    cluster.settle()
    first = cluster.condition("Ready")
    cluster.later(minutes=5)
    cluster.end_job("a", installed())
    cluster.settle()
    assert cluster.condition("Ready")["lastTransitionTime"] == first["lastTransitionTime"]
    cluster.run(works)
    assert cluster.condition("Ready")["lastTransitionTime"] > first["lastTransitionTime"]


@given(st.integers(min_value=0, max_value=10**9))
def test_whatever_happens_it_ends_with_nothing_left(seed: int) -> None:
    """Outcomes, relabelling, nodes that come and go, edits, upgrades with drains and pods: then deletion cleans up."""
    chance = random.Random(seed)
    cluster = FakeCluster()
    cluster.add_nodes("a", "b", "c", "d")

    def edit() -> None:
        cluster.apply(
            kataConfigPoolSelector={"matchExpressions": [{"key": "out", "operator": "DoesNotExist"}]},
            rollout={"maxUnavailable": chance.choice([1, 2, 3]), "drain": chance.random() < 0.5},
            configuration=chance.choice(["", "[runtime]\nenable_debug = true\n"]),
            runtimeClasses=[{"name": "kata"}, {"name": "more", "handler": chance.choice(["kata", "other"])}],
        )

    edit()

    def outcome(action: str, node: str) -> Report | str:
        failed = "Killed" if chance.random() < 0.5 else structs.replace(works(action, node), ok=False)
        return works(action, node) if chance.random() < 0.6 else failed

    for _ in range(30):
        for _ in range(chance.randrange(3)):
            cluster.step()
        working = [job for job in cluster.jobs.values() if "status" not in job]
        assert len(working) <= 3
        cordoned = [name for name, node in cluster.nodes.items() if node.get("spec", {}).get("unschedulable")]
        assert len(cordoned) <= 3
        match chance.randrange(10):
            case 0 | 1 | 2 if working:
                notes = working[0]["metadata"]["annotations"]
                if notes["katapod.io/node"] in cluster.nodes:
                    cluster.end_job(
                        notes["katapod.io/node"], outcome(notes["katapod.io/action"], notes["katapod.io/node"])
                    )
            case 3:
                labels = chance.choice(list(cluster.nodes.values()))["metadata"]["labels"]
                labels.pop("out", None) if "out" in labels else labels.update(out="")
            case 4:
                cluster.later(minutes=30)
            case 5 if len(cluster.nodes) > 1 and chance.random() < 0.2:
                del cluster.nodes[chance.choice(list(cluster.nodes))]
            case 6:
                edit()
            case 7:
                cluster.settings = structs.replace(cluster.settings, target=chance.choice("12"))
            case 8:
                cluster.use(chance.choice(list(cluster.nodes)), chance.choice(["kata", "more"]))
            case 9:
                cluster.refused = {f"default/pod{chance.randrange(4)}": "not now"}
    cluster.refused = {}
    cluster.users.clear()
    cluster.delete()
    for _ in range(20):
        cluster.run(works)
        cluster.later(hours=2)
    assert cluster.is_gone()
    assert (cluster.jobs, cluster.classes) == ({}, {})
    for node in cluster.nodes.values():
        assert node["metadata"]["annotations"] == {}
        assert set(node["metadata"]["labels"]) <= {"out"}
        assert not node.get("spec")
