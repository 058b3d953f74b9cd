"""adjtime(3), and timerfd_create(2) as a notification that the clock has been set.

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
    """Slew the clock by so many microseconds, at 500 per second. The rest of an earlier call is dropped. Raises
    OSError."""
    delta = _TimeValue(*divmod(delta_us, 1_000_000))
    _check(_libc.adjtime(ctypes.byref(delta), None))


def open_clock_bell() -> int:
    """A descriptor that becomes readable when the machine's clock is set, also by a suspend. The caller closes it, and
    re-arms it with ring_again after each time. Raises OSError."""
    fd = _check(_libc.timerfd_create(CLOCK_REALTIME, os.O_NONBLOCK | os.O_CLOEXEC))
    try:
        _arm(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def ring_again(fd: int) -> None:
    """Consume the notification and re-arm the descriptor. Raises OSError."""
    try:
        os.read(fd, 8)
    except BlockingIOError:
        return
    except OSError:  # ECANCELED: the clock was set, which is the notification
        pass
    _arm(fd)


def _arm(fd: int) -> None:
    spec = _TimerSpec(0, 0, NEVER_S, 0)
    flags = TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET
    _check(_libc.timerfd_settime(fd, flags, ctypes.byref(spec), None))
