"""What the operator looks at of a cluster's objects: parsed where they come in, and small, since it holds them all."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

import msgspec

from katapod.model.kataconfig import Spec, Status
from katapod.operator.cluster.machine_config.names import CURRENT, DESIRED, REASON, STATE
from katapod.operator.names import ACTION, MANAGED_BY, MANAGER, NODE_NAME, RECORD, TARGET
from katapod.operator.report import Report

__all__ = [
    "ClassView",
    "ConfigView",
    "JobView",
    "MachineState",
    "NodeView",
    "PodView",
    "Record",
    "UserPod",
    "parse_class",
    "parse_config",
    "parse_job",
    "parse_node",
    "parse_pod",
    "parse_report",
    "parse_user_pod",
]

Body = Mapping[str, Any]
MIRROR = "kubernetes.io/config.mirror"  # the annotation of a static pod's object
TEXT = 1000  # characters of a text that somebody else has written


class Record(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """What has been done on a node, kept in its annotation. A node without one is as it was before us."""

    target: str = ""  # what is installed and proven
    dirty: bool = False  # something may be there beside it: a job has begun, and has not reported
    job: str = ""  # uid of the last job that has ended
    ended: str = ""  # when
    failures: int = 0  # in a row, of the attempt at `report.target`
    report: Report | None = None  # of the last job
    proof: Report | None = None  # of the installation of `target`
    drain: Literal["", "cordoned", "found"] = ""  # being emptied: we have cordoned it, or it was found so


class MachineState(msgspec.Struct, frozen=True):
    """What OpenShift's machine-config daemon says of a node; empty where there is none."""

    state: str = ""  # Done, Working, Degraded
    current: str = ""  # the rendered MachineConfig that it has
    desired: str = ""  # the one that it changes to
    reason: str = ""  # of Degraded


class NodeView(msgspec.Struct, frozen=True):
    name: str
    uid: str
    labels: dict[str, str]
    ready: bool
    handlers: frozenset[str] | None  # that the engine has told the kubelet of; None: the kubelet does not say
    cordoned: bool
    record: Record | None
    system: str = ""  # its OS, as the kubelet tells
    machine: MachineState = MachineState()


class JobView(msgspec.Struct, frozen=True):
    name: str
    uid: str
    node: str
    action: str
    target: str
    ended: Literal["", "Complete", "Failed"]
    ended_at: datetime | None
    message: str  # why it failed, as the job controller says
    leaving: bool


class PodView(msgspec.Struct, frozen=True):
    """A node job's pod."""

    job: str  # uid
    created: str
    ended: bool
    text: str  # the termination message
    waiting: str  # what it waits for


class ClassView(msgspec.Struct, frozen=True):
    name: str
    ours: bool
    handler: str
    overhead: dict[str, str]
    selector: dict[str, str]


class UserPod(msgspec.Struct, frozen=True):
    """A pod in a sandbox of ours that has not ended."""

    name: str  # NAMESPACE/NAME
    node: str
    runtime_class: str
    leaving: bool = False
    bound: bool = False  # of a DaemonSet, or static: it would come again at once, also on a node that is cordoned


class ConfigView(msgspec.Struct, frozen=True):
    name: str
    uid: str
    created: datetime
    generation: int
    leaving: bool
    finalizers: tuple[str, ...]
    annotations: dict[str, str]
    spec: Spec | None
    problem: str  # why there is no spec
    status: Status


def parse_config(body: Body) -> ConfigView:
    meta = body["metadata"]
    spec, problem = None, ""
    try:
        spec = msgspec.convert(_known(body.get("spec") or {}), Spec)
    except msgspec.ValidationError as exc:
        problem = f"spec: {exc}"
    try:
        status = msgspec.convert(_known(body.get("status") or {}), Status)
    except msgspec.ValidationError:  # of another version: it is written anew
        status = Status()
    return ConfigView(
        name=meta["name"],
        uid=meta["uid"],
        created=datetime.fromisoformat(meta["creationTimestamp"]),
        generation=meta.get("generation", 0),
        leaving="deletionTimestamp" in meta,
        finalizers=tuple(meta.get("finalizers", ())),
        annotations=dict(meta.get("annotations", {})),
        spec=spec,
        problem=problem,
        status=status,
    )


def _known(value: Any) -> Any:
    """Without nulls: those are fields that nobody has set."""
    if isinstance(value, Mapping):
        return {key: _known(one) for key, one in value.items() if one is not None}
    return [_known(one) for one in value] if isinstance(value, list) else value


def parse_node(body: Body) -> NodeView:
    meta, status = body["metadata"], body.get("status", {})
    handlers = status.get("runtimeHandlers")
    notes = meta.get("annotations", {})
    return NodeView(
        name=meta["name"],
        uid=meta["uid"],
        labels=dict(meta.get("labels", {})),
        ready=_is_true(status, "Ready"),
        handlers=frozenset(one.get("name", "") for one in handlers) if handlers else None,
        cordoned=bool(body.get("spec", {}).get("unschedulable")),
        record=_parse_record(notes.get(RECORD)),
        system=str((status.get("nodeInfo") or {}).get("osImage", "")),
        machine=MachineState(
            state=notes.get(STATE, ""),
            current=notes.get(CURRENT, ""),
            desired=notes.get(DESIRED, ""),
            reason=str(notes.get(REASON, ""))[:TEXT],
        ),
    )


def _is_true(status: Body, kind: str) -> bool:
    return any(one["type"] == kind and one["status"] == "True" for one in status.get("conditions") or ())


def _parse_record(text: str | None) -> Record | None:
    """One that cannot be read is of a node where something may be."""
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=Record)
    except msgspec.MsgspecError:
        return Record(dirty=True)


def parse_job(body: Body) -> JobView | None:
    """None for a job that is not ours."""
    meta = body["metadata"]
    notes = meta.get("annotations", {})
    if meta.get("labels", {}).get(MANAGED_BY) != MANAGER or NODE_NAME not in notes:
        return None
    conditions = body.get("status", {}).get("conditions") or ()
    ended = [one for one in conditions if one["type"] in ("Complete", "Failed") and one["status"] == "True"]
    return JobView(
        name=meta["name"],
        uid=meta["uid"],
        node=notes[NODE_NAME],
        action=notes.get(ACTION, ""),
        target=notes.get(TARGET, ""),
        ended=ended[0]["type"] if ended else "",
        ended_at=_time(ended[0].get("lastTransitionTime")) if ended else None,
        message=str(ended[0].get("message", ""))[:TEXT] if ended else "",
        leaving="deletionTimestamp" in meta,
    )


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def parse_pod(body: Body) -> PodView | None:
    """None for a pod of no job."""
    meta, status = body["metadata"], body.get("status", {})
    owners = [one["uid"] for one in meta.get("ownerReferences") or () if one["kind"] == "Job"]
    if not owners:
        return None
    states = [one.get("state", {}) for one in status.get("containerStatuses") or ()]
    ended = [one["terminated"] for one in states if "terminated" in one]
    return PodView(
        job=owners[0],
        created=meta["creationTimestamp"],
        ended=bool(ended) or status.get("phase") in ("Succeeded", "Failed"),
        text=str(ended[0].get("message", ""))[:4096] if ended else "",
        waiting=_waiting(status, states)[:TEXT],
    )


def _waiting(status: Body, states: list[Body]) -> str:
    reasons = [one["waiting"] for one in states if "waiting" in one]
    reasons += [one for one in status.get("conditions") or () if one["type"] == "PodScheduled" and "reason" in one]
    if status.get("phase") == "Failed":
        reasons.append(status)
    told = [(one.get("reason", ""), one.get("message", "")) for one in reasons]
    return "; ".join(": ".join(filter(None, words)) for words in told if any(words))


def parse_class(body: Body) -> ClassView:
    meta = body["metadata"]
    return ClassView(
        name=meta["name"],
        ours=meta.get("labels", {}).get(MANAGED_BY) == MANAGER,
        handler=body.get("handler", ""),
        overhead=dict((body.get("overhead") or {}).get("podFixed") or {}),
        selector=dict((body.get("scheduling") or {}).get("nodeSelector") or {}),
    )


def parse_user_pod(body: Body) -> UserPod | None:
    """None for a pod that is in no sandbox: of no RuntimeClass, on no node, or ended."""
    spec, phase = body.get("spec", {}), body.get("status", {}).get("phase")
    if not spec.get("runtimeClassName") or not spec.get("nodeName") or phase in ("Succeeded", "Failed"):
        return None
    meta = body["metadata"]
    bound = MIRROR in meta.get("annotations", {}) or any(
        one.get("kind") == "DaemonSet" and one.get("controller") for one in meta.get("ownerReferences") or ()
    )
    leaving = "deletionTimestamp" in meta
    return UserPod(f"{meta['namespace']}/{meta['name']}", spec["nodeName"], spec["runtimeClassName"], leaving, bound)


def parse_report(text: str) -> Report | None:
    """What a node job has left; None if that is no report."""
    try:
        return msgspec.json.decode(text, type=Report)
    except msgspec.MsgspecError:
        return None
