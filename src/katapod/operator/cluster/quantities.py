"""Quantities of Kubernetes, which the API server writes its own way: 1024Mi comes back as 1Gi, 1000m as 1. Pure.

Source: Kubernetes API, resource.Quantity.
"""

import re
from collections.abc import Mapping
from decimal import Decimal

__all__ = ["same"]

UNITS = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    **{unit: Decimal(1000) ** power for power, unit in enumerate(("k", "M", "G", "T", "P", "E"), 1)},
    **{unit: Decimal(1024) ** power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), 1)},
}
QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")


def same(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether they are the same amounts of the same resources."""
    return one.keys() == other.keys() and all(_value(one[key]) == _value(other[key]) for key in one)


def _value(text: str) -> Decimal | str:
    """As it is, if it is of a form that we do not write."""
    found = QUANTITY.fullmatch(text)
    return Decimal(found[1]) * UNITS[found[2] or ""] if found else text
