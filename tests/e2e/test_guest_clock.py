"""A guest whose clock goes wrong gets its host's time back. It is set wrong from inside: the host's is not touched."""

import time

from kit.kata import Kata, wait_for


def off_by(kata: Kata, name: str) -> float:
    """Seconds that the guest's clock is surely off: what the call took is no difference."""
    before = time.time()
    told = float(kata.ok("exec", name, "date", "+%s"))
    after = time.time()
    return max(0.0, before - 1 - told, told - after)  # date cuts to whole seconds


def test_a_clock_that_was_set_wrong_is_set_right(kata: Kata) -> None:
    name = kata.start("--cap-add", "SYS_TIME", "busybox", "sleep", "1000")
    wait_for(lambda: off_by(kata, name) == 0, "the guest has its host's time from the start", 180, 0.5)
    for wrong in (-3600, 86400):
        kata.ok("exec", name, "date", "-s", f"@{int(time.time()) + wrong}")
        wait_for(lambda: off_by(kata, name) == 0, "the guest has its host's time", 180, 0.5)
