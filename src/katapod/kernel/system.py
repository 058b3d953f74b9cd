"""finit_module(2), reboot(2), swapon(2): system calls that concern the whole machine."""

import ctypes
import os

__all__ = ["load_module", "power_off", "swap_on"]

_FINIT_MODULE = {"x86_64": 313, "aarch64": 273, "riscv64": 273, "ppc64le": 353, "s390x": 344}
MODULE_INIT_COMPRESSED_FILE = 4
RB_POWER_OFF = 0x4321FEDC

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, path: str = "") -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path or None)


def load_module(path: str, parameters: str = "") -> None:
    """Insert one module file; a compressed one is unpacked by the kernel.

    Raises OSError with `path`; FileExistsError if the module is already loaded.
    """
    flags = MODULE_INIT_COMPRESSED_FILE if path.endswith((".xz", ".zst", ".gz")) else 0
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        number = ctypes.c_long(_FINIT_MODULE[os.uname().machine])
        _check(_libc.syscall(number, ctypes.c_int(fd), parameters.encode(), ctypes.c_int(flags)), path)
    finally:
        os.close(fd)


def power_off() -> None:
    """Power off at once, without ending processes or syncing file systems. Raises OSError."""
    _check(_libc.reboot(ctypes.c_int(RB_POWER_OFF)))


def swap_on(path: str) -> None:
    """Use a block device or file as swap. Raises OSError."""
    _check(_libc.swapon(os.fsencode(path), 0), path)
