"""devices.json of a sandbox: what is on disk about its VM's devices, and the lock of those who change it."""

from contextlib import AbstractAsyncContextManager

import msgspec

from katapod.host.locks import locked
from katapod.host.state import write_atomically
from katapod.model.devices import DeviceRecord
from katapod.model.errors import KatapodError
from katapod.model.json_text import decode_json, encode_json
from katapod.model.layout import SandboxPaths

__all__ = ["DeviceFile"]


class DeviceFile:
    def __init__(self, paths: SandboxPaths) -> None:
        self._paths = paths

    def read(self) -> DeviceRecord | None:
        """None if there is none. Raises KatapodError if it cannot be read."""
        path = self._paths.devices
        try:
            return decode_json(path.read_bytes(), DeviceRecord)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, msgspec.DecodeError) as exc:
            raise KatapodError(f"cannot read {path}: {exc}") from exc

    def write(self, record: DeviceRecord) -> None:
        """Replace it in one step. Raises NoSpace, KatapodError; the former content stays then."""
        write_atomically(self._paths.devices, encode_json(record, indent=1))

    def locked(self, limit_s: float, what: str) -> AbstractAsyncContextManager[None]:
        """Be the only process that changes the devices, or that speaks with the VMM beside the supervisor, while the
        block runs. Raises LockTaken ("cannot `what`: ..."), FileNotFoundError if the sandbox is gone, KatapodError."""
        return locked(self._paths.devices_lock, limit_s, what)
