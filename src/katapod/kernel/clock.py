"""adjtime(3), and timerfd_create(2) as a bell that rings when somebody sets the clock.

Python has timerfd only from 3.13 on. Constants: linux/timerfd.h.
"""

import ctypes
import os

__all__ = ["open_clock_bell", "ring_again", "slew_clock"]

CLOCK_REALTIME = 0
TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET = 1, 2
NEVER_S = 1 << 33  # in the year 2242

_libc = ctypes.CDLL(None, use_errno=True)


class _TimeValue(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_usec", ctypes.c_long)]


class _TimerSpec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("interval_s", "interval_ns", "value_s", "value_ns")]


def _check(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def slew_clock(delta_us: int) -> None:
    """Change the clock by so many microseconds, little by little: 500 a second. What a former call has left to do is
    dropped. Raises OSError."""
    delta = _TimeValue(*divmod(delta_us, 1_000_000))
    _check(_libc.adjtime(ctypes.byref(delta), None))


def open_clock_bell() -> int:
    """A descriptor that becomes readable when the machine's clock is set, which a suspend does too. The caller's to
    close, and to arm again after each time by ring_again. Raises OSError."""
    fd = _check(_libc.timerfd_create(CLOCK_REALTIME, os.O_NONBLOCK | os.O_CLOEXEC))
    try:
        _arm(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def ring_again(fd: int) -> None:
    """Take the bell's ring, and wait for the next. Raises OSError."""
    try:
        os.read(fd, 8)
    except BlockingIOError:
        return
    except OSError:  # ECANCELED: the clock was set, which is what we want to hear of
        pass
    _arm(fd)


def _arm(fd: int) -> None:
    spec = _TimerSpec(0, 0, NEVER_S, 0)
    flags = TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET
    _check(_libc.timerfd_settime(fd, flags, ctypes.byref(spec), None))
