"""What to do about a guest's clock that differs from its host's. Pure."""

from msgspec import Struct

__all__ = ["GOOD_ERROR_NS", "Correction", "Reading", "has_wrong_rate", "plan_correction"]

MS = 1_000_000
STEP_FROM_NS = 50 * MS
"""Half of what a guest may be off. Less is slewed, so that time does not run backwards inside."""

SLEW_FROM_NS = 2 * MS
"""Less than that is not worth a call, and whoever disciplines the guest's clock from inside keeps it closer."""

GOOD_ERROR_NS = 5 * MS
"""A reading with this error needs no second one."""


RATE_PART = 8  # an eighth: less was seen of a guest that got hardly any CPU; it is set right


class Reading(Struct, frozen=True):
    """The guest's time as told by a call between two looks at the host's clock, nanoseconds since the epoch."""

    before_ns: int
    guest_ns: int
    after_ns: int

    @property
    def error_ns(self) -> int:
        """The guest looked at its clock at some moment between the two."""
        return (self.after_ns - self.before_ns) // 2

    @property
    def ahead_ns(self) -> int:
        return self.guest_ns - (self.before_ns + self.after_ns) // 2


def has_wrong_rate(elapsed_ns: int, guest_elapsed_ns: int, error_ns: int) -> bool:
    """Whether a guest's clock runs at a rate that nobody could correct. `error_ns`: of the readings at both ends."""
    off_ns = abs(guest_elapsed_ns - elapsed_ns)
    return elapsed_ns > 0 and off_ns > error_ns + elapsed_ns // RATE_PART + SLEW_FROM_NS


class Correction(Struct, frozen=True):
    step_ns: int = 0
    slew_ns: int = 0


def plan_correction(reading: Reading) -> Correction:
    """Nothing, unless the guest is off by more than the reading can be wrong."""
    off_ns = abs(reading.ahead_ns)
    if reading.error_ns < 0 or off_ns <= max(reading.error_ns, SLEW_FROM_NS):
        return Correction()
    if off_ns >= STEP_FROM_NS:
        return Correction(step_ns=-reading.ahead_ns)
    return Correction(slew_ns=-reading.ahead_ns)
