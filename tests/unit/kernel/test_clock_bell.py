"""The bell for steps of the machine's clock, as the kernel shows it; nothing here sets a clock."""

import os
import re
from pathlib import Path

from katapod.kernel.clock import open_clock_bell, ring_again


def test_the_bell_waits_for_a_step_and_for_nothing_else() -> None:
    bell = open_clock_bell()
    try:
        for _ in range(2):
            shown = Path(f"/proc/self/fdinfo/{bell}").read_text()
            assert "clockid: 0" in shown  # CLOCK_REALTIME
            assert "settime flags: 03" in shown  # TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET: timerfd_create(2)
            left = re.search(r"it_value: \((\d+), ", shown)
            assert left is not None
            assert int(left[1]) > 100 * 365 * 86400
            assert not os.get_blocking(bell)
            ring_again(bell)  # has not rung: nothing to take
    finally:
        os.close(bell)
