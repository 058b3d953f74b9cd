"""Random names and numbers, by the kernel's random numbers. The module `secrets` does the same, and loads OpenSSL."""

import os

__all__ = ["new_uuid", "random_below", "random_hex"]


def random_hex(size: int) -> str:
    """`size` bytes, as twice as many hexadecimal digits."""
    return os.urandom(size).hex()


def random_below(limit: int) -> int:
    """A number of 0 to `limit` - 1, which is far less than 2**64: none is noticeably more frequent."""
    return int.from_bytes(os.urandom(16), "big") % limit


def new_uuid() -> str:
    """Of version 4, as uuid.uuid4() makes. Source: RFC 9562, section 5.4."""
    data = bytearray(os.urandom(16))
    data[6] = data[6] & 0x0F | 0x40
    data[8] = data[8] & 0x3F | 0x80
    digits = data.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
