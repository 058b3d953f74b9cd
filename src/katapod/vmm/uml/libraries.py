"""The shared libraries that a User-mode Linux kernel is linked to."""

from pathlib import Path

import msgspec

__all__ = ["libraries_of"]

MANIFEST_MAX = 1 << 20
USUAL = (Path("/lib/x86_64-linux-gnu/libc.so.6"), Path("/lib64/ld-linux-x86-64.so.2"))


class _Manifest(msgspec.Struct):
    """Of a guest image, as far as it matters here."""

    libraries: tuple[str, ...] = ()


def libraries_of(kernel: Path) -> tuple[Path, ...]:
    """By the manifest of the image that the kernel belongs to; for a kernel without one, those of Debian's."""
    try:
        with (kernel.resolve().parent / "manifest.json").open("rb") as handle:
            found = msgspec.json.decode(handle.read(MANIFEST_MAX), type=_Manifest).libraries
    except (OSError, msgspec.DecodeError):
        return USUAL
    return tuple(map(Path, found)) or USUAL
