"""What is preloaded into a kernel of User-mode Linux, so that it runs on processors with registers that it does not
know, and calls handlers of signals with the flags that they are to find: see regset.c, from which tools/build_native.py
makes the library."""

from pathlib import Path

__all__ = ["REGSET", "preload"]

REGSET = Path(__file__).with_name("libregset.so.1")


def preload(library: Path = REGSET) -> dict[str, str]:
    """The environment that has the dynamic linker load it (ld.so(8)). `library`: where the kernel sees it."""
    return {"LD_PRELOAD": str(library)}
