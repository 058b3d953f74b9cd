"""What the validating webhook says of a KataConfig: pure. The status says the same of one that came past it.

Source: Kubernetes API, admission.k8s.io/v1 AdmissionReview.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from katapod.operator.cluster.validation import problems_of
from katapod.operator.cluster.views import ConfigView, parse_config

__all__ = ["BadReview", "answer"]


class BadReview(Exception):
    """It is no review of a KataConfig."""


class _Request(msgspec.Struct, frozen=True, rename="camel"):
    uid: str
    operation: str
    object: dict[str, Any] | None = None
    old_object: dict[str, Any] | None = None


class _Review(msgspec.Struct, frozen=True, rename="camel"):
    api_version: str
    request: _Request


def answer(text: bytes, there: Sequence[ConfigView]) -> dict[str, Any]:
    """The AdmissionReview to answer with; `there`: the KataConfigs of the cluster. Raises BadReview."""
    try:
        review = msgspec.json.decode(text, type=_Review)
        refused = _refused(review.request, there)
    except (msgspec.MsgspecError, KeyError, ValueError, TypeError, AttributeError) as exc:
        raise BadReview(f"cannot read the review: {exc!r}") from exc
    response: dict[str, Any] = {"uid": review.request.uid, "allowed": not refused}
    if refused:
        response["status"] = {"code": 422, "message": refused}  # of a reason kubectl would show that alone
    return {"apiVersion": review.api_version, "kind": "AdmissionReview", "response": response}


def _refused(request: _Request, there: Sequence[ConfigView]) -> str:
    """Why; empty if it may be. What does not touch `spec` always may: a finalizer has to go whatever the spec says."""
    if request.object is None or request.operation not in ("CREATE", "UPDATE"):
        return ""
    new, old = request.object, request.old_object or {}
    if request.operation == "UPDATE" and ("deletionTimestamp" in new["metadata"] or new.get("spec") == old.get("spec")):
        return ""
    name = new["metadata"].get("name", "")
    others = sorted(one.name for one in there if one.name != name and not one.leaving)
    if request.operation == "CREATE" and others:
        return (
            f"there is one KataConfig already, {others[0]}, and a cluster has one: change that one, or delete it first"
        )
    meta = {"uid": "", "creationTimestamp": "1970-01-01T00:00:00Z", **new["metadata"]}
    view = parse_config({**new, "metadata": meta})
    return view.problem or "; ".join(problems_of(view.spec) if view.spec is not None else ())
