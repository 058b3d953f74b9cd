"""Label selectors, as Kubernetes has them. Source: Kubernetes API, LabelSelector."""

from collections.abc import Mapping

from katapod.model.kataconfig import Requirement, Selector

__all__ = ["selects"]


def selects(selector: Selector | None, labels: Mapping[str, str]) -> bool:
    """Without a selector all are chosen."""
    if selector is None:
        return True
    return all(labels.get(key) == value for key, value in selector.match_labels.items()) and all(
        _holds(one, labels) for one in selector.match_expressions
    )


def _holds(one: Requirement, labels: Mapping[str, str]) -> bool:
    match one.operator:
        case "In":
            return labels.get(one.key) in one.values
        case "NotIn":
            return labels.get(one.key) not in one.values
        case "Exists":
            return one.key in labels
        case "DoesNotExist":
            return one.key not in labels
