"""What containerd tells about its tasks while a block runs, by `ctr events`."""

import contextlib
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any

from kit.kata import wait_for

__all__ = ["Events", "listening"]


class Events:
    """The lines so far. One is: DATE TIME ZONE... NAMESPACE TOPIC JSON."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def of(self, topic: str, container: str) -> list[dict[str, Any]]:
        """The contents of the events of this topic about this container, oldest first."""
        return [content for its_topic, content in self._parsed() if its_topic == topic and _about(content) == container]

    def topics(self, container: str) -> list[str]:
        """The topics of all events about this container, oldest first."""
        return [topic for topic, content in self._parsed() if _about(content) == container]

    def _parsed(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for line in list(self.lines):
            head, brace, rest = line.partition("{")
            if brace:
                yield head.split()[-1], json.loads(brace + rest)

    def read(self, stream: IO[bytes]) -> None:
        for line in stream:
            self.lines.append(line.decode().rstrip("\n"))


def _about(content: dict[str, Any]) -> str | None:
    return content.get("container_id") or content.get("id")


@contextlib.contextmanager
def listening(command: list[str], stir: Callable[[int], object]) -> Iterator[Events]:
    """Run `ctr events`; `stir(number)` has to cause an event that names `stir-NUMBER`: then it is known to listen."""
    found = Events()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=found.read, args=(process.stdout,), name="ctr events")
        reader.start()
        attempts = iter(range(1000))

        def heard() -> bool:
            stir(next(attempts))
            return any("stir-" in line for line in list(found.lines))

        try:
            wait_for(heard, "ctr events listens", 180, 0.1)
            yield found
        finally:
            process.kill()
            reader.join()
