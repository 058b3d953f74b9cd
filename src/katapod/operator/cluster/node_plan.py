"""What to do about one node: pure, from what is seen of it. Every step can be repeated, and seen by its effects alone.

The order keeps that true whichever watch is late: a job's outcome is written into the node's record, and the job is
removed only once it is seen there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

import msgspec

from katapod.model.kataconfig import NodeStatus, Spec
from katapod.operator.cluster.selectors import selects
from katapod.operator.cluster.views import JobView, NodeView, PodView, Record, UserPod, parse_report
from katapod.operator.names import ELIGIBLE, READY, READY_LABEL
from katapod.operator.report import Report

__all__ = ["Draining", "NodePlan", "Phase", "Wanted", "is_chosen", "is_labelled", "plan_node"]

RETRY_S, RETRY_MAX_S = 60, 3600
REPORT_S = 30
SHOWN = 300  # characters of a message in the status


class Phase(StrEnum):
    READY = "Ready"
    NOT_READY = "NotReady"  # installed; the node itself is not Ready
    SETTLING = "Settling"  # installed; the kubelet has not told of the handler yet
    WAITING = "WaitingToInstall"
    DRAINING = "Draining"  # pods of ours are evicted, before it is installed anew
    INSTALLING = "Installing"
    FAILED = "FailedToInstall"
    LEAVING = "WaitingToUninstall"
    UNINSTALLING = "Uninstalling"
    STUCK = "FailedToUninstall"


@dataclass(frozen=True, slots=True)
class NodePlan:
    node: NodeView
    phase: Phase | None  # None: the node is not ours, and nothing is on it
    message: str = ""
    write: tuple[Record | None, bool] | None = None  # the record and whether the node is labelled ready
    cordon: bool | None = None  # with `write`: whether pods may be scheduled there; None: as it is
    delete_job: str = ""
    start: str = ""  # the job that may begin as soon as there is room for it
    begun: bool = False  # with `start`: there was room for it already
    evict: tuple[UserPod, ...] = ()
    blocked: bool = False  # one of them may not be evicted now
    busy: bool = False  # a job is at work, or it is being emptied for one
    retry: datetime | None = None  # when to look again

    def status(self) -> NodeStatus:
        record = self.node.record or Record()
        proof = record.proof or Report(action="install", ok=False)
        return NodeStatus(
            name=self.node.name,
            phase=str(self.phase),
            message=self.message[:SHOWN],
            target=record.target,
            accelerator=proof.accelerator,
            kernel=proof.kernel,
            proof_seconds=round(proof.proof_s, 3),
            engine=proof.engine,
        )


@dataclass(frozen=True, slots=True)
class Draining:
    """Whether a node is emptied before it is installed anew, of which pods, and which of them may not be evicted now:
    by name, with the reason."""

    wanted: bool
    pods: tuple[UserPod, ...]
    refused: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a chosen node is to have."""

    target: str
    handlers: frozenset[str]


def is_chosen(spec: Spec, node: NodeView) -> bool:
    """Whether the node is to have the runtime."""
    if spec.check_node_eligibility and node.labels.get(ELIGIBLE) != "true":
        return False
    proof = node.record.proof if node.record is not None and node.record.target else None
    if proof is not None and proof.accelerator not in spec.accelerators:
        return False
    return selects(spec.kata_config_pool_selector, node.labels)


def plan_node(
    node: NodeView,
    job: JobView | None,
    pod: PodView | None,
    *,
    wanted: Wanted | None,
    users: tuple[str, ...],
    draining: Draining,
    now: datetime,
) -> NodePlan:
    """`wanted`: None for a node that is not chosen. `users`: pods of ours that its removal waits for."""
    record = node.record
    working = Phase.INSTALLING if job is not None and job.action == "install" else Phase.UNINSTALLING
    if job is not None and not job.ended:
        return NodePlan(node, working, pod.waiting if pod else "its job has no pod yet", busy=True)
    if job is not None and (record is None or record.job != job.uid):
        if (late := _report_due(job, pod)) is not None and now < late:
            return NodePlan(node, working, "its job has ended, and its report is awaited", busy=True, retry=late)
        after = _ended(record or Record(), job, pod, now)
        keeps = is_labelled(node) and bool(after.target)
        return NodePlan(node, working, "its job has ended", write=(after, keeps), busy=True)
    if job is not None:
        # what was taken away altogether is forgotten together with the job that has done it
        return NodePlan(node, *_shown(record or Record()), delete_job=job.name, busy=True)
    if wanted is None:
        return _unwanted(node, record, users, now)
    return _wanted(node, record, wanted, draining, now)


def _report_due(job: JobView, pod: PodView | None) -> datetime | None:
    """Until when to wait for what the job's pod has left: the watch of pods may be behind that of jobs."""
    if job.ended_at is None or (pod is not None and pod.ended):
        return None
    return job.ended_at + timedelta(seconds=REPORT_S)


def is_labelled(node: NodeView) -> bool:
    return node.labels.get(READY_LABEL) == READY


def _ended(record: Record, job: JobView, pod: PodView | None, now: datetime) -> Record:
    """The node's record after a job."""
    told = parse_report(pod.text) if pod is not None else None
    report = told or Report(
        action="install" if job.action == "install" else "uninstall",
        ok=False,
        stage="job",
        message=(pod.text.strip()[-SHOWN:] or pod.waiting if pod else "") or job.message or "it left no report",
    )
    report = msgspec.structs.replace(report, target=job.target)  # the node knows of the payload only
    ended = now.isoformat(timespec="seconds")
    if not report.ok:
        same = record.report is not None and record.report.action == report.action
        failures = (record.failures if same and record.failures else 0) + 1
        dirty = told is None or (report.action == "uninstall" and (record.dirty or bool(record.target)))
        return msgspec.structs.replace(record, job=job.uid, ended=ended, report=report, failures=failures, dirty=dirty)
    after = Record(job=job.uid, ended=ended, report=report, drain=record.drain)
    installed = report.action == "install"
    return msgspec.structs.replace(after, target=job.target, proof=report) if installed else after


def _shown(record: Record) -> tuple[Phase, str]:
    """While a job that has ended is removed."""
    report = record.report or Report(action="install", ok=False)
    if not report.ok:
        return (Phase.STUCK if report.action == "uninstall" else Phase.FAILED), _told(report)
    return (Phase.UNINSTALLING if report.action == "uninstall" else Phase.SETTLING), report.message


def _failed(record: Record | None, action: str) -> Report | None:
    report = record.report if record is not None else None
    return report if report is not None and not report.ok and report.action == action else None


def _retry_at(record: Record) -> datetime:
    wait_s = min(RETRY_S * 2 ** (record.failures - 1), RETRY_MAX_S)
    return datetime.fromisoformat(record.ended) + timedelta(seconds=wait_s)


def _told(report: Report) -> str:
    return f"stage {report.stage}: {report.message}"


def _wanted(node: NodeView, record: Record | None, wanted: Wanted, draining: Draining, now: datetime) -> NodePlan:
    if record is not None and record.target == wanted.target and not record.dirty:
        return _installed(node, record, wanted.handlers)
    if READY_LABEL in node.labels and (record is None or not record.target):  # nothing has been proven here
        return NodePlan(node, Phase.WAITING, write=(record, False))
    failed = _failed(record, "install")
    if record is not None and failed is not None and failed.target == wanted.target:
        if record.drain and not record.dirty:
            return _opened(node, record, Phase.FAILED, _told(failed))
        retry = _retry_at(record)
        return NodePlan(node, Phase.FAILED, _told(failed), start="install" if now >= retry else "", retry=retry)
    if record is not None and record.drain:
        return _drained(node, draining)
    return NodePlan(node, Phase.WAITING, start="drain" if draining.wanted and _is_upgrade(record) else "install")


def _is_upgrade(record: Record | None) -> bool:
    return record is not None and bool(record.target)


def _drained(node: NodeView, draining: Draining) -> NodePlan:
    """A node that has been cordoned: its pods of ours end, then the job begins."""
    pods = tuple(one for one in draining.pods if not one.bound) if draining.wanted else ()
    if not pods:
        return NodePlan(node, Phase.WAITING, start="install", begun=True)
    whys = {one.name: draining.refused.get(one.name, "") for one in pods}
    told = ", ".join(f"{name} ({why})" if why else name for name, why in list(whys.items())[:10])
    evict = tuple(one for one in pods if not one.leaving)
    blocked = any(whys.values())
    return NodePlan(node, Phase.DRAINING, f"waits for {told}", evict=evict, blocked=blocked, busy=True)


def _opened(node: NodeView, record: Record, phase: Phase, message: str = "") -> NodePlan:
    """A node that was cordoned for us takes pods again."""
    write = (msgspec.structs.replace(record, drain=""), is_labelled(node))
    return NodePlan(node, phase, message, write=write, cordon=False if record.drain == "cordoned" else None)


def _installed(node: NodeView, record: Record, handlers: frozenset[str]) -> NodePlan:
    proof = record.proof
    if record.drain:
        return _opened(node, record, Phase.SETTLING)
    if is_labelled(node):
        phase = Phase.READY if node.ready else Phase.NOT_READY
        return NodePlan(node, phase, (proof.message if proof else "") if node.ready else "the node is not Ready")
    if not node.ready:
        return NodePlan(node, Phase.NOT_READY, "the node is not Ready")
    if node.handlers is not None and (missing := sorted(handlers - node.handlers)):
        return NodePlan(node, Phase.SETTLING, f"the kubelet does not list the handler {', '.join(missing)} yet")
    return NodePlan(node, Phase.SETTLING, write=(record, True))


def _unwanted(node: NodeView, record: Record | None, users: tuple[str, ...], now: datetime) -> NodePlan:
    if record is None:
        return NodePlan(node, None, write=(None, False) if READY_LABEL in node.labels else None)
    if record.drain:
        return _opened(node, record, Phase.LEAVING)
    if not record.target and not record.dirty:
        return NodePlan(node, None, write=(None, False))
    if users:
        return NodePlan(node, Phase.LEAVING, f"waits for {', '.join(users[:10])}")
    if READY_LABEL in node.labels:
        return NodePlan(node, Phase.LEAVING, write=(record, False))
    failed = _failed(record, "uninstall")
    if failed is not None:
        retry = _retry_at(record)
        return NodePlan(node, Phase.STUCK, _told(failed), start="uninstall" if now >= retry else "", retry=retry)
    return NodePlan(node, Phase.LEAVING, start="uninstall")
