"""A cluster as values: it takes the operator's changes as an API server would, and ends jobs as a test says."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from katapod.operator.cluster.changes import (
    ApplyClass,
    Change,
    ChangeConfig,
    ChangeNode,
    CreateJob,
    DeleteClass,
    DeleteJob,
    EvictPod,
)
from katapod.operator.cluster.decide import Observed, Plan, decide, needs_pods
from katapod.operator.cluster.objects import Settings
from katapod.operator.cluster.views import (
    parse_class,
    parse_config,
    parse_job,
    parse_node,
    parse_pod,
    parse_user_pod,
)
from katapod.operator.report import Report

SETTINGS = Settings("katapod", "katapod.io/node:1", "1")
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
Body = dict[str, Any]


def installed(accelerator: str = "kvm") -> Report:
    return Report(action="install", ok=True, target="1", stage="done", accelerator=accelerator, proof_s=1.5)


def refused(stage: str = "proof") -> Report:
    return Report(action="install", ok=False, target="1", stage=stage, message="it does not work")


REMOVED = Report(action="uninstall", ok=True, stage="done")


@dataclass
class FakeCluster:
    nodes: dict[str, Body] = field(default_factory=dict)
    jobs: dict[str, Body] = field(default_factory=dict)
    pods: dict[str, Body] = field(default_factory=dict)  # of jobs, by the job's name
    classes: dict[str, Body] = field(default_factory=dict)
    config: Body | None = None
    users: list[Body] = field(default_factory=list)
    settings: Settings = SETTINGS
    refused: dict[str, str] = field(default_factory=dict)  # pods that may not be evicted
    now: datetime = BEGIN
    made: list[str] = field(default_factory=list)  # "ACTION NODE" of each job

    def add_nodes(self, *names: str, **labels: str) -> None:
        for name in names:
            conditions = [{"type": "Ready", "status": "True"}]
            metadata = {"name": name, "uid": f"uid-{name}", "labels": dict(labels), "annotations": {}}
            self.nodes[name] = {"metadata": metadata, "status": {"conditions": conditions}}

    def apply(self, **spec: Any) -> None:
        metadata = {"name": "kata", "uid": "uid-kata", "creationTimestamp": "2026-01-01T00:00:00Z", "generation": 1}
        self.config = self.config or {"metadata": metadata}
        self.config["spec"] = spec

    def delete(self) -> None:
        assert self.config is not None
        self.config["metadata"]["deletionTimestamp"] = "2026-01-01T01:00:00Z"

    def is_gone(self) -> bool:
        return self.config is None

    def use(self, node: str, runtime_class: str = "kata") -> None:
        spec = {"nodeName": node, "runtimeClassName": runtime_class}
        metadata = {"name": f"pod{len(self.users)}", "namespace": "default"}
        self.users.append({"metadata": metadata, "spec": spec, "status": {"phase": "Running"}})

    def observed(self) -> Observed:
        found = Observed(
            configs=(parse_config(self.config),) if self.config else (),
            nodes=tuple(map(parse_node, self.nodes.values())),
            jobs=tuple(one for body in self.jobs.values() if (one := parse_job(body))),
            pods=tuple(view for body in self.pods.values() if (view := parse_pod(body))),
            classes=tuple(map(parse_class, self.classes.values())),
            users=None,
            now=self.now,
            refused=self.refused,
        )
        users = tuple(user for body in self.users if (user := parse_user_pod(body)))
        return dataclasses.replace(found, users=users if needs_pods(found, self.settings) else None)

    def step(self) -> Plan:
        """One pass of the operator."""
        plan = decide(self.observed(), self.settings)
        self.take(plan)
        return plan

    def take(self, plan: Plan) -> None:
        for change in plan.changes:
            self._take(change)
        if self.config and (status := plan.statuses.get("kata")) is not None:
            self.config["status"] = msgspec.to_builtins(status)

    def settle(self) -> Plan:
        """Passes until nothing is to be done. Each may be repeated without effect."""
        for _ in range(50):
            plan = self.step()
            if not plan.changes:
                return plan
        raise AssertionError(f"it does not come to rest: {plan.changes}")

    def end_job(self, node: str, outcome: Report | str) -> None:
        """With a report, or by what is left of a pod that has none."""
        name = next(
            name for name, job in self.jobs.items() if job["metadata"]["annotations"]["katapod.io/node"] == node
        )
        job = self.jobs[name]
        text = outcome if isinstance(outcome, str) else msgspec.json.encode(outcome).decode()
        good = not isinstance(outcome, str) and outcome.ok
        job["status"] = {"conditions": [{"type": "Complete" if good else "Failed", "status": "True"}]}
        metadata = {
            "name": f"{name}-x",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "ownerReferences": [{"kind": "Job", "uid": job["metadata"]["uid"]}],
        }
        status = {"containerStatuses": [{"state": {"terminated": {"message": text}}}]}
        self.pods[name] = {"metadata": metadata, "status": status}

    def run(self, outcome: Callable[[str, str], Report | str]) -> Plan:
        """Until nothing is to be done and no job is at work; outcome(action, node) is what jobs come to."""
        for _ in range(2 * len(self.nodes) + 200):
            plan = self.settle()
            working = [job for job in self.jobs.values() if "status" not in job]
            if not working:
                return plan
            notes = working[0]["metadata"]["annotations"]
            self.end_job(notes["katapod.io/node"], outcome(notes["katapod.io/action"], notes["katapod.io/node"]))
        raise AssertionError("its jobs do not end")

    def phases(self) -> dict[str, str]:
        assert self.config is not None
        return {one["name"]: one["phase"] for one in self.config["status"]["nodes"]}

    def condition(self, kind: str) -> Body:
        assert self.config is not None
        found: Body = next(one for one in self.config["status"]["conditions"] if one["type"] == kind)
        return found

    def later(self, **span: float) -> None:
        self.now += timedelta(**span)

    def _take(self, change: Change) -> None:
        match change:
            case ChangeNode(name, patch):
                for part in ("labels", "annotations"):
                    _merge(self.nodes[name]["metadata"][part], patch["metadata"][part])
                if "spec" in patch:
                    _merge(self.nodes[name].setdefault("spec", {}), patch["spec"])
            case CreateJob(body):
                name = body["metadata"]["name"]
                if name not in self.jobs:
                    notes = body["metadata"]["annotations"]
                    self.made.append(f"{notes['katapod.io/action']} {notes['katapod.io/node']}")
                    metadata = {**body["metadata"], "uid": f"job-{len(self.made)}"}
                    self.jobs[name] = {"metadata": metadata, "spec": body["spec"]}
            case DeleteJob(name):
                del self.jobs[name]
                self.pods.pop(name, None)
            case ApplyClass(body):
                self.classes[body["metadata"]["name"]] = body
            case EvictPod(name):
                if name not in self.refused:
                    self.users = [one for one in self.users if f"default/{one['metadata']['name']}" != name]
            case DeleteClass(name):
                del self.classes[name]
            case ChangeConfig(_, finalizers):
                assert self.config is not None
                self.config["metadata"]["finalizers"] = list(finalizers)
                if not finalizers and "deletionTimestamp" in self.config["metadata"]:
                    self.config = None


def _merge(values: dict[str, Any], patch: dict[str, Any]) -> None:
    for key, value in patch.items():
        if value is None:
            values.pop(key, None)
        else:
            values[key] = value
