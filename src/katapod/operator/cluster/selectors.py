"""Label selectors, as Kubernetes has them. Source: Kubernetes API, LabelSelector."""

from collections.abc import Mapping

from katapod.model.kataconfig import Requirement, Selector

__all__ = ["problem_of", "selects"]


def problem_of(selector: Selector | None) -> str:
    """What is wrong with it, with the field's path; empty if nothing is."""
    for index, one in enumerate(selector.match_expressions if selector is not None else ()):
        place = f"spec.kataConfigPoolSelector.matchExpressions[{index}].values"
        if one.operator in ("In", "NotIn") and not one.values:
            return f"{place}: {one.operator} needs at least one"
        if one.operator in ("Exists", "DoesNotExist") and one.values:
            return f"{place}: {one.operator} takes none"
    return ""


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
