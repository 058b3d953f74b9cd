"""Named volumes: directories that outlive the containers which mount them.

    ROOT/NAME/volume.json    what is known of it
    ROOT/NAME/_data/         what containers see

One is made whole under a name of its own, and renamed: nobody sees half of it. It goes by a rename, too.
"""

import contextlib
import os
import time
from pathlib import Path

import msgspec

from katapod.host.hints import hint_for
from katapod.host.removal import remove_tree
from katapod.model.errors import KatapodError, NotFound
from katapod.model.json_text import decode_json, encode_json
from katapod.model.tokens import random_hex

__all__ = ["VolumeRecord", "VolumeStore"]

COPY_LIMIT_S = 3600.0


class VolumeRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`anonymous`: made for one container without a name, and removed with it by `run --rm`."""

    name: str
    created_at: float  # seconds since the epoch
    labels: dict[str, str] = {}
    anonymous: bool = False
    version: int = 1


class VolumeStore:
    """Names were parsed by model.mount_flags.parse_volume_name: they are one component of a path."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def data(self, name: str) -> Path:
        return self.root / name / "_data"

    def ensure(self, name: str, *, labels: dict[str, str] | None = None, anonymous: bool = False) -> bool:
        """Make a volume unless it is there; whether it was made. Raises KatapodError."""
        if self.data(name).is_dir():
            return False
        staged = self.root / f".{name}.{random_hex(4)}"
        record = VolumeRecord(name, time.time(), dict(labels or {}), anonymous)
        try:
            (staged / "_data").mkdir(parents=True)
            self.root.chmod(0o711)
            (staged / "_data").chmod(0o755)
            (staged / "volume.json").write_bytes(encode_json(record))
            os.rename(staged, self.root / name)
        except OSError as exc:
            with contextlib.suppress(KatapodError):
                remove_tree(staged)
            if self.data(name).is_dir():
                return False  # somebody was faster
            raise KatapodError(f"cannot make volume {name}: {exc.strerror}", hint=hint_for(exc)) from exc
        return True

    def read(self, name: str) -> VolumeRecord:
        """Raises NotFound, KatapodError."""
        path = self.root / name / "volume.json"
        try:
            return decode_json(path.read_bytes(), VolumeRecord)
        except FileNotFoundError as exc:
            raise NotFound(f"cannot find volume {name}: there is none", hint="see: kata-runtime volume ls") from exc
        except (OSError, msgspec.DecodeError) as exc:
            raise KatapodError(f"cannot read {path}: {exc}") from exc

    def list(self) -> "tuple[VolumeRecord, ...]":
        """By name. One that is removed meanwhile is left out. Raises KatapodError."""
        found = []
        names: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            names = sorted(os.listdir(self.root))
        for name in names:
            if not name.startswith("."):
                with contextlib.suppress(NotFound):
                    found.append(self.read(name))
        return tuple(found)

    def remove(self, name: str) -> None:
        """Remove it with all in it; the caller has seen that nobody uses it. Raises NotFound, KatapodError."""
        aside = self.root / f".{name}.{random_hex(4)}"
        try:
            os.rename(self.root / name, aside)
        except FileNotFoundError as exc:
            raise NotFound(f"cannot remove volume {name}: there is none", hint="see: kata-runtime volume ls") from exc
        except OSError as exc:
            raise KatapodError(f"cannot remove volume {name}: {exc.strerror}") from exc
        remove_tree(aside)

    async def fill(self, name: str, root: Path, destination: str) -> None:
        """Copy what an image, whose files are below `root`, has at `destination` into a volume that is empty. Its links
        are followed within the image; what is no directory is left alone. Raises KatapodError."""
        from katapod.host.process import run  # which loads asyncio: `volume ls` does without
        from katapod.kernel.openat2 import open_in_root

        data = self.data(name)
        if os.listdir(data):
            return
        top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            place = open_in_root(top, destination, os.O_PATH | os.O_DIRECTORY)
        except OSError:
            return
        finally:
            os.close(top)
        source, status = os.readlink(f"/proc/self/fd/{place}"), os.fstat(place)
        os.close(place)
        os.chown(data, status.st_uid, status.st_gid)
        data.chmod(status.st_mode & 0o7777)
        if os.listdir(source):
            await run(["cp", "-a", "--reflink=auto", "-T", source, str(data)], timeout_s=COPY_LIMIT_S)

    def sweep(self) -> None:
        """Remove what a process that was killed left behind. Raises KatapodError."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.root):
                if name.startswith("."):
                    remove_tree(self.root / name)
