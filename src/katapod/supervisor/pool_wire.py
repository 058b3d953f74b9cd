"""What `kata-runtime run` and the pool say to each other, on the server's socket and then with one of its members; and
`kata-runtime exec` and the process that holds the sandbox.

A frame is four bytes of length (network order), one byte of kind, and the payload. Both sides are root's and of one
version: a request names its version, and is refused by another. The client imports this module before all else, so
it imports nothing that takes time: no enum, no dataclass, no msgspec.

    client                      member (handed over by the server)
    REQUEST + 4 descriptors ->
                             <- TAKEN, or REFUSED: the client does it by itself
    GO                      ->
    SIGNAL ...              ->
                             <- EXIT; of an exec also FAILED, with what to say
"""

from __future__ import annotations

import os

__all__ = [
    "EXIT",
    "FAILED",
    "FRAME_MAX",
    "GO",
    "HEADER",
    "QUIT",
    "REFUSED",
    "REQUEST",
    "SIGNAL",
    "STATUS",
    "TAKEN",
    "FrameError",
    "Request",
    "config_files",
    "fingerprint",
    "frame",
    "namespaces",
    "parse_header",
]

REQUEST, GO, SIGNAL, STATUS, QUIT = b"R", b"G", b"s", b"S", b"Q"  # from the client
TAKEN, REFUSED, EXIT, FAILED = b"T", b"N", b"x", b"F"  # to the client; STATUS and QUIT are answered by their own kind

HEADER = 5  # bytes
FRAME_MAX = 4 << 20  # of a payload: twice what execve(2) takes of arguments and environment by default

CONFIG_PATHS = (
    "/etc/kata-containers/configuration.toml",
    "/usr/share/kata-containers/defaults/configuration.toml",
)
"""Where the configuration is looked for: model.config.CONFIG_PATHS, which takes too long to import."""

NAMESPACES = ("mnt", "net", "pid", "user")


class FrameError(Exception):
    """What came is no frame, or no request."""


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(4, "big") + kind + payload


def parse_header(data: bytes) -> tuple[int, bytes]:
    """(length of the payload, kind). Raises FrameError if it is too long."""
    length = int.from_bytes(data[:4], "big")
    if length > FRAME_MAX:
        raise FrameError(f"a frame of {length} bytes is too long")
    return length, data[4:HEADER]


class Request:
    """A `run` or `exec` as its process was called. Texts are bytes, as the kernel has them: none holds a NUL.

    Its descriptors, beside it: standard input, output and error; of a `run` also the working directory. An `exec` has
    neither marks nor environment.
    """

    __slots__ = ("environment", "marks", "umask", "version", "words")

    def __init__(
        self,
        version: bytes,
        marks: list[bytes],
        umask: int,
        words: list[bytes],
        environment: list[bytes],
    ) -> None:
        self.version = version
        self.marks = marks  # fingerprint of the configuration, namespaces: equal where the pool can stand in
        self.umask = umask
        self.words = words  # of the command line, without the program
        self.environment = environment  # NAME=VALUE

    def encode(self) -> bytes:
        lists = (self.marks, self.words, self.environment)
        head = [self.version, b"%d" % self.umask, *(b"%d" % len(items) for items in lists)]
        return b"\0".join([*head, *self.marks, *self.words, *self.environment])

    @classmethod
    def decode(cls, payload: bytes) -> Request:
        """Raises FrameError."""
        try:
            version, umask, *rest = payload.split(b"\0")
            counts = [int(count) for count in rest[:3]]
            items = rest[3:]
            if min(counts) < 0 or len(counts) != 3 or sum(counts) != len(items):
                raise ValueError("the numbers do not add up")
            marks, words = counts[0], counts[0] + counts[1]
            return cls(version, items[:marks], int(umask), items[marks:words], items[words:])
        except ValueError as exc:
            raise FrameError(f"cannot read a request: {exc}") from exc


def config_files(chosen: str) -> list[str]:
    """The files that a configuration is read from: `chosen`, else the first that is there, and its drop-ins."""
    path = chosen or next((path for path in CONFIG_PATHS if os.path.exists(path)), "")
    if not path:
        return []
    path = os.path.realpath(path)
    directory = os.path.join(os.path.dirname(path), "config.d")
    try:
        return [path, *(os.path.join(directory, name) for name in sorted(os.listdir(directory)))]
    except (FileNotFoundError, NotADirectoryError):
        return [path]


def fingerprint(files: list[str]) -> bytes:
    """Tells whether two processes read the same configuration. Raises OSError."""
    found = []
    for path in files:
        status = os.stat(path)
        found.append(f"{path}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}")
    found.append(os.environ.get("KATAPOD_ACCELERATOR", ""))  # stands in for a key of it
    return os.fsencode("\n".join(found))


def namespaces() -> list[bytes]:
    """What of the world the calling thread sees: its namespaces and its root directory. Raises OSError."""
    found = [os.stat(f"/proc/thread-self/ns/{kind}") for kind in NAMESPACES] + [os.stat("/")]
    return [b"%d:%d" % (status.st_dev, status.st_ino) for status in found]
