"""What the operator sees of objects: also of those that are half there, or that somebody has spoilt."""

from typing import Any

import msgspec
import pytest

from katapod.model.kataconfig import Requirement, Selector, Status
from katapod.operator.cluster.events import changes_of, known_phases, node_changes, phases_of
from katapod.operator.cluster.node_plan import NodePlan, Phase
from katapod.operator.cluster.selectors import selects
from katapod.operator.cluster.views import Record, parse_config, parse_job, parse_node, parse_pod, parse_user_pod
from katapod.operator.report import Report

META = {"name": "x", "namespace": "n", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"}


def test_a_spec_that_the_schema_would_have_refused_is_named() -> None:
    found = parse_config({"metadata": META, "spec": {"rollout": {"maxUnavailable": "many"}}})
    assert found.spec is None
    assert found.problem.startswith("spec: Expected `int`, got `str`")
    assert "rollout.maxUnavailable" in found.problem


def test_nulls_are_fields_that_nobody_has_set() -> None:
    found = parse_config({"metadata": META, "spec": {"kataConfigPoolSelector": None}, "status": {"nodes": None}})
    assert found.spec is not None
    assert found.spec.kata_config_pool_selector is None
    assert found.status == Status()


def test_a_status_of_another_version_is_forgotten() -> None:
    assert parse_config({"metadata": META, "status": {"conditions": "none"}}).status == Status()


def test_a_record_that_somebody_has_spoilt_means_that_something_may_be_there() -> None:
    node = {"metadata": {**META, "annotations": {"katapod.io/record": "no JSON"}}}
    assert parse_node(node).record == Record(dirty=True)


def test_a_record_survives_its_annotation() -> None:
    report = Report(action="install", ok=True, target="1", accelerator="uml", proof_s=1.5)
    record = Record(target="1", job="j", ended="2026-01-01T00:00:00+00:00", report=report, proof=report)
    node = {"metadata": {**META, "annotations": {"katapod.io/record": msgspec.json.encode(record).decode()}}}
    assert parse_node(node).record == record


@pytest.mark.parametrize(
    ("handlers", "listed"), [(None, None), ([], None), ([{"name": ""}], {""}), ([{"name": "kata"}], {"kata"})]
)
def test_whether_the_kubelet_lists_the_handler(handlers: Any, listed: set[str] | None) -> None:
    assert parse_node({"metadata": META, "status": {"runtimeHandlers": handlers}}).handlers == listed


def test_a_job_of_somebody_else() -> None:
    assert parse_job({"metadata": META}) is None
    assert parse_job({"metadata": {**META, "labels": {"app.kubernetes.io/managed-by": "katapod-operator"}}}) is None


def test_what_a_pod_waits_for() -> None:
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    pod = {
        "metadata": {**META, "ownerReferences": [{"kind": "Job", "uid": "j"}]},
        "status": {"phase": "Pending", "containerStatuses": [{"state": {"waiting": waiting}}]},
    }
    found = parse_pod(pod)
    assert found is not None
    assert (found.job, found.waiting, found.ended) == ("j", "ImagePullBackOff: no such image", False)
    assert parse_pod({"metadata": META}) is None


@pytest.mark.parametrize(
    ("spec", "phase", "counts"),
    [
        ({"runtimeClassName": "kata", "nodeName": "a"}, "Running", True),
        ({"runtimeClassName": "kata", "nodeName": "a"}, "Unknown", True),
        ({"runtimeClassName": "kata", "nodeName": "a"}, "Succeeded", False),
        ({"runtimeClassName": "kata"}, "Pending", False),
        ({"nodeName": "a"}, "Running", False),
    ],
)
def test_which_pods_are_in_a_sandbox(spec: Any, phase: str, counts: bool) -> None:
    found = parse_user_pod({"metadata": META, "spec": spec, "status": {"phase": phase}})
    assert (found is not None) == counts


@pytest.mark.parametrize(
    ("operator", "values", "holds"),
    [
        ("In", ("1", "2"), True),
        ("In", ("2",), False),
        ("NotIn", ("2",), True),
        ("NotIn", ("1",), False),
        ("Exists", (), True),
        ("DoesNotExist", (), False),
    ],
)
def test_selectors(operator: Any, values: tuple[str, ...], holds: bool) -> None:
    assert selects(Selector(match_expressions=(Requirement("a", operator, values),)), {"a": "1"}) == holds


def test_a_label_that_is_not_there() -> None:
    assert selects(None, {})
    assert not selects(Selector(match_labels={"a": "1"}), {})
    assert selects(Selector(match_expressions=(Requirement("a", "NotIn", ("1",)),)), {})


def test_events_tell_of_conditions_once() -> None:
    def status(degraded: str) -> Status:
        condition = {"type": "Degraded", "status": degraded, "reason": "NodesFailed", "message": "m"}
        condition |= {"lastTransitionTime": "t"}
        return msgspec.convert({"conditions": [{**condition, "observedGeneration": 1}]}, Status)

    told = list(changes_of(status("False"), status("True")))
    assert [(one.warning, one.reason) for one in told] == [(True, "NodesFailed")]
    assert list(changes_of(status("True"), status("True"))) == []


def test_events_tell_of_nodes_once() -> None:
    def nodes(**phases: Phase) -> list[NodePlan]:
        return [NodePlan(parse_node({"metadata": {**META, "name": name}}), phase) for name, phase in phases.items()]

    installing, failed = nodes(a=Phase.INSTALLING), nodes(a=Phase.FAILED)
    assert [(one.warning, one.reason) for one in node_changes(phases_of(installing), failed)] == [
        (True, "NodeFailedToInstall")
    ]
    assert list(node_changes(phases_of(failed), failed)) == []
    assert [one.reason for one in node_changes(phases_of(failed), nodes(a=Phase.READY))] == ["NodeReady"]
    # of an operator that has just begun: what the status has no room for was told
    many = nodes(a=Phase.READY, b=Phase.READY, c=Phase.FAILED)
    status = Status(nodes=(many[0].status(),), nodes_omitted=2)
    assert [one.message for one in node_changes(known_phases(status, many), many)] == ["c: "]
    assert len(list(node_changes(known_phases(Status(), many), many))) == 3
