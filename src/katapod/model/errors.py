"""The errors that Katapod raises on purpose.

Classes are what a caller can act on, not where something happened:

    KatapodError
    |-- UsageError          the caller asked for something that makes no sense; asking again is no use
    |-- SpecError           an OCI bundle or its config.json is wrong
    |-- ConfigError         configuration.toml is wrong, or names files that are not there
    |-- NotFound            no container, sandbox, image, ... of that name
    |-- AlreadyExists       the name is taken
    |-- InvalidState        not legal in the present state of a container or sandbox
    |-- NoSpace             a file system or a memory limit has no room left
    `-- HostLacks           this host has not what is needed; `hint` says what to install or load
        |-- MissingProgram  a program is not installed
        `-- DeviceMissing   a device node or kernel feature is absent

Every room derives its own errors from these. Messages read "cannot <verb> <thing>: <cause>".
"""

from typing import ClassVar

from katapod.model.plain import LINES, plain

__all__ = [
    "AlreadyExists",
    "ConfigError",
    "DeviceMissing",
    "HostLacks",
    "InvalidState",
    "KatapodError",
    "MissingProgram",
    "NoSpace",
    "NotFound",
    "SpecError",
    "UsageError",
]


class KatapodError(Exception):
    """Base of all errors that Katapod raises on purpose.

    `what` is one sentence for people; `hint` says what they can do about it and may be empty;
    `context` holds values for the log (ids, paths). Both texts are made plain: guests have a part in many.
    """

    exit_code: ClassVar[int] = 125
    """Exit status of a command that fails with this error. 125 is what Docker and Podman use for
    errors of the runtime itself, so that they cannot be taken for the container's own status."""

    def __init__(self, what: str, *, hint: str = "", **context: object) -> None:
        super().__init__(plain(what, keep=LINES))
        self.what = str(self)
        self.hint = plain(hint, keep=LINES)
        self.context = context


class UsageError(KatapodError):
    """A flag, name or argument is wrong."""


class SpecError(KatapodError):
    """An OCI runtime spec or bundle is wrong; the message names the place in the file."""


class ConfigError(KatapodError):
    """The configuration is wrong; the message names the file and the key."""


class NotFound(KatapodError):
    """What was asked for is not there."""


class AlreadyExists(KatapodError):
    """The name or id is taken."""


class InvalidState(KatapodError):
    """The operation is not legal in the present state; the message names the state and the one needed."""


class NoSpace(KatapodError):
    """No room left on a file system or in memory; the message names where."""


class HostLacks(KatapodError):
    """This host lacks something that Katapod needs."""


class MissingProgram(HostLacks):
    """A program is not installed."""


class DeviceMissing(HostLacks):
    """A device node or kernel feature is absent."""
