"""Where a container's output goes in tests."""

__all__ = ["Kept"]


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.data = b""

    async def write(self, data: bytes) -> None:
        self.data += data

    def close(self) -> None:
        pass
