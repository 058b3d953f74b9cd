"""The back end MachineConfig, on a cluster of values with a simulated machine-config operator."""

import copy
import random
from typing import Any

import pytest
from cluster_helper import FakeCluster
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_helper import POOL_SETTINGS, PoolCluster, notes, objects
from msgspec import structs

from kit.machine_config import CONFIGS, POOLS, RUNTIMES, openshift_node

EXTENSION = "50-enable-sandboxed-containers-extension"
KATA_OC = "node-role.kubernetes.io/kata-oc"
SELECTOR = {"kataConfigPoolSelector": {"matchLabels": {"vm": "yes"}}}


@pytest.fixture
def cluster() -> PoolCluster:
    found = PoolCluster()
    found.begin()
    return found


def choose(cluster: PoolCluster, *names: str) -> None:
    for name, node in cluster.nodes.items():
        node["metadata"]["labels"].pop("vm", None)
        if name in names:
            node["metadata"]["labels"]["vm"] = "yes"


def stripped(cluster: PoolCluster) -> dict[str, Any]:
    """Nodes without what the machine-config operator writes."""
    found = copy.deepcopy(cluster.nodes)
    for node in found.values():
        kept = {key: value for key, value in node["metadata"]["annotations"].items() if "machineconfig" not in key}
        node["metadata"]["annotations"] = kept
    return found


def test_all_workers_get_it_as_in_the_walkthrough(cluster: PoolCluster) -> None:
    before = stripped(cluster)
    cluster.apply()
    cluster.rest()
    config = cluster.api.kinds[CONFIGS][EXTENSION]
    assert config["spec"] == {"config": {"ignition": {"version": "3.2.0"}}, "extensions": ["sandboxed-containers"]}
    assert config["metadata"]["labels"]["machineconfiguration.openshift.io/role"] == "worker"
    assert config["metadata"]["labels"]["app"] == "kata"
    assert set(cluster.api.kinds[POOLS]) == {"master", "worker"}
    assert cluster.phases() == {"a": "Ready", "b": "Ready", "c": "Ready"}
    assert sorted(cluster.mco.reboots) == ["a", "b", "c"]
    assert cluster.classes["kata"]["scheduling"]["nodeSelector"] == {
        "node-role.kubernetes.io/worker": "",
        "katapod.io/runtime": "ready",
    }
    assert cluster.config is not None
    assert cluster.config["status"]["backend"] == "MachineConfig"
    assert cluster.condition("Ready")["status"] == "True"
    assert cluster.condition("InProgress")["status"] == "False"
    assert cluster.made == [], "no node job"

    cluster.delete()
    cluster.rest()
    assert cluster.is_gone()
    assert objects(cluster) == []
    assert (stripped(cluster), cluster.classes) == (before, {})
    assert sorted(cluster.mco.reboots) == ["a", "a", "b", "b", "c", "c"]


def test_no_class_before_a_node_is_done_and_no_pod_where_it_is_not(cluster: PoolCluster) -> None:
    cluster.mco.held = {"a", "b", "c"}
    cluster.apply()
    cluster.until(
        lambda: bool(cluster.nodes_of("installing")) if cluster.config and "status" in cluster.config else False
    )
    assert cluster.classes == {}
    assert cluster.nodes_of("installing") == ["a"]
    assert cluster.nodes_of("waitingToInstall") == ["b", "c"]
    assert cluster.condition("InProgress")["reason"] == "Installing"
    assert "0 of 3 machines are updated" in cluster.condition("Progressing")["message"]
    cluster.mco.held = {"b", "c"}
    cluster.until(lambda: "kata" in cluster.classes)
    assert [name for name in "abc" if cluster.labels(name).get("katapod.io/runtime") == "ready"] == ["a"]


def test_before_the_pool_is_rendered_no_node_counts_as_installed(cluster: PoolCluster) -> None:
    """Upstream's table alone would: the daemon says Done, and the node has what the pool had."""
    cluster.apply()
    cluster.settle()
    assert cluster.nodes_of("installed") == []
    assert cluster.nodes_of("waitingToInstall") == ["a", "b", "c"]
    assert cluster.config is not None
    assert cluster.config["status"]["waitingForMcoToStart"] is True
    cluster.rest()
    assert cluster.config["status"]["waitingForMcoToStart"] is False


def test_a_part_of_the_workers_gets_a_pool(cluster: PoolCluster) -> None:
    before = stripped(cluster)
    choose(cluster, "b")
    before["b"]["metadata"]["labels"]["vm"] = "yes"
    cluster.apply(**SELECTOR)
    cluster.rest()
    pool = cluster.api.kinds[POOLS]["kata-oc"]
    assert pool["spec"]["nodeSelector"] == {"matchLabels": {KATA_OC: ""}}
    [wanted] = pool["spec"]["machineConfigSelector"]["matchExpressions"]
    assert (wanted["operator"], list(wanted["values"])) == ("In", ["kata-oc", "worker"])
    assert "pools.operator.machineconfiguration.openshift.io/kata-oc" in pool["metadata"]["labels"]
    labels = cluster.api.kinds[CONFIGS][EXTENSION]["metadata"]["labels"]
    assert labels["machineconfiguration.openshift.io/role"] == "kata-oc"
    assert [name for name in cluster.nodes if KATA_OC in cluster.labels(name)] == ["b"]
    assert cluster.phases() == {"b": "Ready"}
    assert cluster.mco.reboots == ["b"], "one reboot, and of no other node"
    assert KATA_OC in cluster.classes["kata"]["scheduling"]["nodeSelector"]
    cluster.delete()
    cluster.rest()
    assert cluster.is_gone()
    assert objects(cluster) == []
    assert stripped(cluster) == before


def test_what_is_to_go_goes_in_order(cluster: PoolCluster) -> None:
    choose(cluster, "b")
    cluster.apply(**SELECTOR, logLevel="debug")
    cluster.rest()
    cluster.use("b")
    cluster.delete()
    cluster.rest()
    blocked = cluster.condition("Blocked")
    assert blocked["message"] == "deletion waits for 1 pods: default/pod0"
    assert cluster.classes["kata"]["scheduling"]["nodeSelector"]["katapod.io/runtime"] == "closed"
    assert cluster.labels("b")["katapod.io/runtime"] == "ready", "the running pod's node keeps what its selector needs"
    assert EXTENSION in cluster.api.kinds[CONFIGS]
    cluster.users.clear()
    cluster.written.clear()
    cluster.rest()
    assert cluster.is_gone()
    steps = [
        "DeleteClass kata",
        "b leaves",
        f"delete MachineConfig {EXTENSION}",
        "delete MachineConfigPool kata-oc",
        "ChangeConfig kata",
    ]
    assert [cluster.written.index(one) for one in steps] == sorted(cluster.written.index(one) for one in steps)
    deletions = cluster.written
    assert "delete ContainerRuntimeConfig kata-crio-config" in deletions
    assert "delete DaemonSet openshift-sandboxed-containers-monitor" in deletions
    assert notes(cluster.nodes["b"], "state") == "Done"


def test_the_pool_stays_until_no_node_has_what_was_rendered_for_it(cluster: PoolCluster) -> None:
    choose(cluster, "b")
    cluster.apply(**SELECTOR)
    cluster.rest()
    cluster.mco.held = {"b"}
    cluster.delete()
    cluster.rest()
    assert cluster.nodes_of("uninstalling") == ["b"]
    assert "kata-oc" in cluster.api.kinds[POOLS]
    cluster.mco.held = set()
    cluster.rest()
    assert cluster.is_gone()
    assert "kata-oc" not in cluster.api.kinds[POOLS]


def test_a_degraded_node_is_named_with_its_reason_and_recovers(cluster: PoolCluster) -> None:
    cluster.mco.degraded = {"b": "rpm-ostree: no space left"}
    cluster.apply()
    cluster.rest()
    assert cluster.phases() == {"a": "Ready", "b": "FailedToInstall", "c": "WaitingToInstall"}
    assert cluster.nodes_of("failedToInstall") == ["b"]
    failed = cluster.condition("Degraded")
    assert (failed["reason"], failed["message"]) == ("NodesFailed", "b: rpm-ostree: no space left")
    assert cluster.condition("InProgress")["reason"] == "Failed"
    assert "b" in cluster.condition("InProgress")["message"]
    cluster.mco.degraded = {}
    cluster.rest()
    assert cluster.condition("Ready")["status"] == "True"
    assert cluster.condition("Degraded")["status"] == "False"


def test_a_pool_that_cannot_be_rendered_is_named(cluster: PoolCluster) -> None:
    cluster.mco.refused = {"worker": "invalid extensions found: [sandboxed-containers]"}
    cluster.apply()
    cluster.rest()
    told = cluster.condition("Degraded")
    assert told["reason"] == "PoolDegraded"
    assert told["message"] == "MachineConfigPool worker: invalid extensions found: [sandboxed-containers]"


def test_nodes_follow_the_selector_one_reboot_each(cluster: PoolCluster) -> None:
    choose(cluster, "a")
    cluster.apply(**SELECTOR)
    cluster.rest()
    choose(cluster, "b")
    cluster.rest()
    assert cluster.phases() == {"b": "Ready"}
    assert cluster.condition("InProgress")["status"] == "False"
    assert sorted(cluster.mco.reboots) == ["a", "a", "b"]
    assert KATA_OC not in cluster.labels("a")
    assert cluster.nodes["a"]["metadata"]["annotations"].get("katapod.io/record") is None


def test_a_node_that_is_not_chosen_any_more_waits_for_its_pods(cluster: PoolCluster) -> None:
    choose(cluster, "a", "b")
    cluster.apply(**SELECTOR)
    cluster.rest()
    cluster.use("a")
    choose(cluster, "b")
    cluster.rest()
    assert cluster.phases() == {"a": "WaitingToUninstall", "b": "Ready"}
    assert cluster.condition("Blocked")["message"] == "a waits for default/pod0"
    assert KATA_OC in cluster.labels("a")
    cluster.users.clear()
    cluster.rest()
    assert cluster.phases() == {"b": "Ready"}


def test_later_changes_are_told_as_updates(cluster: PoolCluster) -> None:
    choose(cluster, "a")
    cluster.apply(**SELECTOR)
    cluster.rest()
    cluster.mco.held = {"b"}
    choose(cluster, "a", "b")
    cluster.rest()
    assert cluster.condition("InProgress")["reason"] == "Updating"


def test_from_all_workers_to_some_and_back(cluster: PoolCluster) -> None:
    """Those that keep it are not rebooted; those that lose it wait for their pods."""
    cluster.apply()
    cluster.rest()
    cluster.mco.reboots.clear()
    choose(cluster, "a")
    cluster.use("c")
    cluster.apply(**SELECTOR)
    cluster.rest()
    labels = cluster.api.kinds[CONFIGS][EXTENSION]["metadata"]["labels"]
    assert labels["machineconfiguration.openshift.io/role"] == "worker"
    assert cluster.phases()["c"] == "WaitingToUninstall"
    cluster.users.clear()
    cluster.rest()
    assert cluster.phases() == {"a": "Ready"}
    assert sorted(cluster.mco.reboots) == ["b", "c"]
    cluster.mco.reboots.clear()
    cluster.apply()
    cluster.rest()
    assert cluster.phases() == {"a": "Ready", "b": "Ready", "c": "Ready"}
    assert sorted(cluster.mco.reboots) == ["b", "c"]
    assert set(cluster.api.kinds[POOLS]) == {"master", "worker"}
    assert KATA_OC not in cluster.labels("a")


def test_an_upgrade_rolls_the_nodes_and_keeps_them_usable(cluster: PoolCluster) -> None:
    cluster.settings = structs.replace(POOL_SETTINGS, os_image="registry.example/os:1")
    cluster.apply()
    cluster.rest()
    assert cluster.config is not None
    assert cluster.config["status"]["nodes"][0]["target"] == "registry.example/os:1"
    cluster.mco.reboots.clear()
    cluster.mco.held = {"b"}
    cluster.settings = structs.replace(POOL_SETTINGS, os_image="registry.example/os:2")
    cluster.rest()
    assert cluster.phases() == {"a": "Ready", "b": "Installing", "c": "WaitingToInstall"}
    assert cluster.condition("InProgress")["reason"] == "Updating"
    assert all(cluster.labels(name)["katapod.io/runtime"] == "ready" for name in "abc")
    cluster.mco.held = set()
    cluster.rest()
    assert sorted(cluster.mco.reboots) == ["a", "b", "c"]
    assert {one["target"] for one in cluster.config["status"]["nodes"]} == {"registry.example/os:2"}


def test_from_an_extension_to_an_os_image(cluster: PoolCluster) -> None:
    cluster.apply()
    cluster.rest()
    cluster.settings = structs.replace(POOL_SETTINGS, os_image="registry.example/os:1")
    cluster.rest()
    ours = [name for name in cluster.api.kinds[CONFIGS] if name.startswith("50-")]
    assert ours == ["50-enable-sandboxed-containers-image"]
    assert cluster.condition("Ready")["status"] == "True"


def test_the_log_level_comes_and_goes(cluster: PoolCluster) -> None:
    choose(cluster, "a")
    cluster.apply(**SELECTOR, logLevel="debug")
    cluster.rest()
    spec = cluster.api.kinds[RUNTIMES]["kata-crio-config"]["spec"]
    pool_label = "pools.operator.machineconfiguration.openshift.io/kata-oc"
    assert spec["machineConfigPoolSelector"] == {"matchLabels": {pool_label: ""}}
    assert spec["containerRuntimeConfig"] == {"logLevel": "debug"}
    cluster.apply()
    cluster.rest()
    assert cluster.api.kinds[RUNTIMES] == {}
    cluster.apply(logLevel="warn")
    cluster.rest()
    spec = cluster.api.kinds[RUNTIMES]["kata-crio-config"]["spec"]
    assert list(spec["machineConfigPoolSelector"]["matchLabels"]) == [pool_label.replace("kata-oc", "worker")]
    assert cluster.condition("Ready")["status"] == "True"


def test_a_paused_pool_is_told_as_the_reason(cluster: PoolCluster) -> None:
    cluster.api.kinds[POOLS]["worker"]["spec"]["paused"] = True
    cluster.apply()
    cluster.rest()
    told = cluster.condition("Progressing")
    assert (told["status"], told["reason"]) == ("False", "Paused")
    assert told["message"] == "MachineConfigPool worker: spec.paused; waiting: a, b, c"
    assert cluster.mco.reboots == []
    cluster.api.kinds[POOLS]["worker"]["spec"]["paused"] = False
    cluster.rest()
    assert cluster.condition("Ready")["status"] == "True"


def test_a_pause_of_ours_ends_and_one_of_others_does_not(cluster: PoolCluster) -> None:
    choose(cluster, "a", "b")
    cluster.mco.held = {"a"}
    cluster.apply(**SELECTOR)
    cluster.rest()
    cluster.apply(**SELECTOR, rollout={"paused": True})
    cluster.mco.held = set()
    cluster.rest()
    pool = cluster.api.kinds[POOLS]["kata-oc"]
    assert pool["spec"]["paused"] is True
    assert cluster.phases() == {"a": "Ready", "b": "WaitingToInstall"}
    assert cluster.condition("Progressing")["message"] == "spec.rollout.paused; waiting: b"
    cluster.apply(**SELECTOR)
    cluster.rest()
    assert cluster.condition("Ready")["status"] == "True"
    assert cluster.api.kinds[POOLS]["kata-oc"]["spec"]["paused"] is False
    cluster.api.kinds[POOLS]["kata-oc"]["spec"]["paused"] = True
    choose(cluster, "a", "b", "c")
    cluster.rest()
    assert cluster.condition("Progressing")["message"] == "MachineConfigPool kata-oc: spec.paused; waiting: c"
    assert cluster.api.kinds[POOLS]["kata-oc"]["spec"]["paused"] is True


def test_the_first_of_our_pool_goes_alone(cluster: PoolCluster) -> None:
    choose(cluster, "a", "b", "c")
    cluster.apply(**SELECTOR, rollout={"maxUnavailable": 2})
    cluster.rest()
    assert cluster.api.kinds[POOLS]["kata-oc"]["spec"]["maxUnavailable"] == 2
    assert cluster.mco.reboots[0] == "a"
    assert "change MachineConfigPool kata-oc" in cluster.written
    assert cluster.condition("Ready")["status"] == "True"


def test_only_eligible_nodes(cluster: PoolCluster) -> None:
    cluster.labels("c")["feature.node.kubernetes.io/runtime.kata"] = "true"
    cluster.apply(checkNodeEligibility=True)
    cluster.rest()
    assert cluster.phases() == {"c": "Ready"}
    assert KATA_OC in cluster.labels("c")


def test_masters_of_a_converged_cluster() -> None:
    cluster = PoolCluster()
    cluster.begin(workers="", masters="abc")
    for name in "abc":
        cluster.labels(name)["node-role.kubernetes.io/worker"] = ""
    cluster.apply(logLevel="debug")
    cluster.rest()
    assert cluster.phases() == {"a": "Ready", "b": "Ready", "c": "Ready"}
    labels = cluster.api.kinds[CONFIGS][EXTENSION]["metadata"]["labels"]
    assert labels["machineconfiguration.openshift.io/role"] == "master"
    assert "node-role.kubernetes.io/master" in cluster.classes["kata"]["scheduling"]["nodeSelector"]
    cluster.apply(**SELECTOR)
    cluster.rest()
    assert cluster.condition("Degraded")["message"].startswith("spec.kataConfigPoolSelector: all nodes here are in")
    cluster.delete()
    cluster.rest()
    assert cluster.is_gone()
    assert objects(cluster) == []


def test_masters_that_are_workers_too_are_left_alone(cluster: PoolCluster) -> None:
    cluster.labels("m")["node-role.kubernetes.io/worker"] = ""
    cluster.apply(kataConfigPoolSelector={"matchExpressions": [{"key": "vm", "operator": "DoesNotExist"}]})
    cluster.rest()
    assert set(cluster.phases()) == {"a", "b", "c"}
    assert KATA_OC not in cluster.labels("m")


def add_infra(cluster: PoolCluster, **labels: str) -> None:
    cluster.nodes["i"] = openshift_node("i", "worker", "infra", **labels)
    cluster.nodes["i"]["metadata"]["uid"] = "uid-i"
    roles = {"key": "machineconfiguration.openshift.io/role", "operator": "In", "values": ["worker", "infra"]}
    spec = {
        "machineConfigSelector": {"matchExpressions": [roles]},
        "nodeSelector": {"matchLabels": {"node-role.kubernetes.io/infra": ""}},
    }
    metadata = {"name": "infra", "labels": {}}
    cluster.api.ask("POST", POOLS, {"metadata": metadata, "spec": spec})
    cluster.mco.settle()


def test_a_node_of_another_custom_pool_cannot_join_and_says_so(cluster: PoolCluster) -> None:
    add_infra(cluster, vm="yes")
    choose(cluster, "a", "i")
    cluster.apply(**SELECTOR)
    cluster.rest()
    assert cluster.phases() == {"a": "Ready", "i": "FailedToInstall"}
    assert "belongs to infra, kata-oc" in cluster.condition("Degraded")["message"]
    assert KATA_OC not in cluster.labels("i")
    cluster.delete()
    cluster.rest()
    assert cluster.is_gone()


def test_custom_pools_that_have_what_workers_have_get_it_too(cluster: PoolCluster) -> None:
    add_infra(cluster)
    cluster.apply()
    cluster.rest()
    assert set(cluster.phases()) == {"a", "b", "c", "i"}
    cluster.delete()
    cluster.rest()
    assert cluster.is_gone()
    assert cluster.mco.reboots.count("i") == 2


def test_a_new_worker_is_noticed(cluster: PoolCluster) -> None:
    cluster.apply()
    cluster.rest()
    cluster.nodes["d"] = openshift_node("d", "worker")
    cluster.nodes["d"]["metadata"]["uid"] = "uid-d"
    cluster.rest()
    assert cluster.phases()["d"] == "Ready"


def test_what_is_changed_by_hand_is_put_right(cluster: PoolCluster) -> None:
    choose(cluster, "a")
    cluster.apply(**SELECTOR)
    cluster.rest()
    cluster.api.kinds[CONFIGS][EXTENSION]["spec"]["extensions"] = []
    cluster.api.kinds[POOLS]["kata-oc"]["spec"]["nodeSelector"] = {}
    cluster.labels("b")[KATA_OC] = ""
    cluster.rest()
    assert cluster.api.kinds[CONFIGS][EXTENSION]["spec"]["extensions"] == ["sandboxed-containers"]
    assert cluster.phases() == {"a": "Ready"}
    assert KATA_OC not in cluster.labels("b")


def test_objects_of_another_operator_are_left_alone(cluster: PoolCluster) -> None:
    cluster.api.ask("POST", CONFIGS, {"metadata": {"name": EXTENSION, "labels": {}}, "spec": {}})
    cluster.apply()
    cluster.rest()
    assert cluster.condition("Degraded")["message"].startswith(f"somebody else has made the MachineConfig {EXTENSION}")
    assert cluster.config is not None
    assert "finalizers" not in cluster.config["metadata"], "its deletion waits for nothing"
    assert cluster.written == []


def test_a_class_waits_for_its_handler_and_closes_before_it_goes(cluster: PoolCluster) -> None:
    for name in "abc":
        cluster.nodes[name]["status"]["runtimeHandlers"] = [{"name": "runc"}]
    cluster.apply()
    cluster.rest()
    assert set(cluster.phases().values()) == {"Settling"}
    assert cluster.classes == {}
    for name in "abc":
        cluster.nodes[name]["status"]["runtimeHandlers"] = [{"name": "kata"}]
    cluster.rest()
    assert cluster.condition("Ready")["status"] == "True"
    cluster.use("a")
    cluster.apply(runtimeClasses=[{"name": "other"}])
    cluster.rest()
    assert cluster.classes["kata"]["scheduling"]["nodeSelector"]["katapod.io/runtime"] == "closed"
    assert cluster.classes["other"]["scheduling"]["nodeSelector"]["katapod.io/runtime"] == "ready"
    cluster.users.clear()
    cluster.rest()
    assert set(cluster.classes) == {"other"}


def test_by_force_it_goes_at_once(cluster: PoolCluster) -> None:
    choose(cluster, "a")
    cluster.apply(**SELECTOR)
    cluster.rest()
    cluster.use("a")
    assert cluster.config is not None
    cluster.config["metadata"]["annotations"] = {"katapod.io/force-delete": "true"}
    cluster.delete()
    cluster.step()
    assert cluster.is_gone()
    assert cluster.classes == {}
    assert objects(cluster) == ["kata-oc"], "its node has what was rendered for it"
    cluster.mco.settle()
    assert notes(cluster.nodes["a"], "state") == "Done"


@pytest.mark.parametrize(
    ("system", "extension"),
    [
        ("Red Hat Enterprise Linux CoreOS 48.84.202108161759-0 (Ootpa)", "sandboxed-containers"),
        ("Fedora CoreOS 38.20230322", "kata-containers"),
        ("CentOS Stream CoreOS 9", "kata-containers"),
    ],
)
def test_the_extension_follows_the_os(cluster: PoolCluster, system: str, extension: str) -> None:
    for node in cluster.nodes.values():
        node["status"]["nodeInfo"]["osImage"] = system
    cluster.apply()
    cluster.rest()
    assert cluster.api.kinds[CONFIGS][EXTENSION]["spec"]["extensions"] == [extension]
    cluster.settings = structs.replace(POOL_SETTINGS, extension="mine")
    cluster.rest()
    assert cluster.api.kinds[CONFIGS][EXTENSION]["spec"]["extensions"] == ["mine"]


def test_auto_takes_jobs_where_nodes_are_no_coreos(cluster: PoolCluster) -> None:
    for node in cluster.nodes.values():
        node["status"]["nodeInfo"]["osImage"] = "Debian GNU/Linux 12 (bookworm)"
    cluster.apply()
    cluster.settle()
    assert cluster.made
    assert cluster.config is not None
    assert cluster.config["status"]["backend"] == "NodeJobs"


def test_without_its_api_the_back_end_is_refused() -> None:
    cluster = FakeCluster()
    cluster.add_nodes("a")
    cluster.apply(backend="MachineConfig")
    cluster.step()
    told = cluster.condition("Degraded")
    assert told["reason"] == "Invalid"
    assert "needs the API group machineconfiguration.openshift.io" in told["message"]
    assert cluster.made == []
    cluster.apply(logLevel="debug")
    cluster.step()
    assert cluster.condition("Degraded")["message"].startswith("spec.logLevel")
    cluster.delete()
    cluster.config = None


def test_the_back_end_stays(cluster: PoolCluster) -> None:
    cluster.apply()
    cluster.rest()
    cluster.apply(backend="NodeJobs")
    cluster.rest()
    assert cluster.condition("Degraded")["message"].startswith("spec.backend: it has MachineConfig, and cannot change")
    assert cluster.config is not None
    assert cluster.config["status"]["backend"] == "MachineConfig"
    cluster.config["status"] = {}
    cluster.apply()
    cluster.rest()
    assert cluster.config["status"]["backend"] == "MachineConfig"
    assert cluster.made == []


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"accelerators": ["kvm"]}, "spec.accelerators"),
        ({"runtimeClasses": [{"name": "kata-uml", "accelerator": "uml"}]}, "spec.runtimeClasses"),
        ({"configuration": "[runtime]\nenable_debug = true\n"}, "spec.configuration"),
        (
            {"runtimeClasses": [{"name": "kata", "overhead": {"mode": "measured"}}]},
            "spec.runtimeClasses[0].overhead.mode",
        ),
    ],
)
def test_what_needs_node_jobs_is_refused(cluster: PoolCluster, spec: dict[str, Any], field: str) -> None:
    cluster.apply(**spec)
    cluster.rest()
    assert cluster.condition("Degraded")["message"].startswith(field)


def test_at_rest_nothing_is_asked_for(cluster: PoolCluster) -> None:
    choose(cluster, "a")
    cluster.apply(**SELECTOR, logLevel="debug", rollout={"maxUnavailable": 2})
    cluster.rest()
    assert cluster.step().changes == ()


def lost(cluster: PoolCluster) -> list[str]:
    """Running pods of ours whose node is told to have no runtime."""
    configs = {name: body["spec"].get("extensions") or () for name, body in cluster.api.kinds[CONFIGS].items()}
    return [
        one["metadata"]["name"]
        for one in cluster.users
        if "sandboxed-containers" not in configs[notes(cluster.nodes[one["spec"]["nodeName"]], "desiredConfig")]
    ]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_whatever_happens_it_ends_where_it_should(seed: int) -> None:
    """Nodes change their labels, fail, hold and recover, specs change, pods come and go, KataConfigs too, and either
    operator is behind the other.
    """
    chance = random.Random(seed)
    cluster = PoolCluster()
    cluster.begin()
    before = stripped(cluster)
    specs: list[dict[str, Any]] = [SELECTOR, {}, {"logLevel": "debug"}, {"rollout": {"paused": True}}]
    cluster.apply(**chance.choice(specs))
    for _ in range(80):
        match chance.randrange(10):
            case 0:
                choose(cluster, *(name for name in "abc" if chance.random() < 0.5))
            case 1:
                if cluster.config is not None and chance.random() < 0.1:
                    cluster.delete()
                cluster.apply(**chance.choice(specs))
            case 2:
                cluster.mco.degraded = {chance.choice("abc"): "broken"} if chance.random() < 0.5 else {}
            case 3:
                cluster.mco.held = {chance.choice("abc")} if chance.random() < 0.5 else set()
            case 4:
                wanted = cluster.classes.get("kata", {}).get("scheduling", {}).get("nodeSelector")
                node = chance.choice("abc")
                if wanted and wanted.items() <= cluster.labels(node).items():
                    cluster.use(node)
            case 5:
                cluster.users.clear()
            case 6 | 7:
                cluster.step()
            case _:
                cluster.mco.step()
        assert not any("missing MachineConfig" in notes(node, "reason") for node in cluster.nodes.values())
        assert not lost(cluster)
    cluster.mco.degraded, cluster.mco.held = {}, set()
    cluster.users.clear()
    choose(cluster, "a", "c")
    cluster.apply(**SELECTOR)
    cluster.rest()  # also what was being deleted
    cluster.apply(**SELECTOR)
    cluster.rest()
    assert cluster.phases() == {"a": "Ready", "c": "Ready"}
    cluster.delete()
    cluster.rest()
    assert cluster.is_gone()
    assert objects(cluster) == []
    choose(cluster)
    assert stripped(cluster) == before
