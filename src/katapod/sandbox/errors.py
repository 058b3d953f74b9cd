"""The errors of this room.

KatapodError
|-- ConsoleOff               the sandbox was started without a debug console
|-- ConsoleIsRaw             its debug console is only upstream's: bytes, no sizes, no exit status
`-- AgentFailed              the guest agent did not come up, stopped answering, or refused
    |-- GuestHangs           the guest did not boot, or wake, in time
    (becomes, for a process that could not be started:)
|-- CommandNotFound          exit status 127
`-- CommandNotExecutable     exit status 126
"""

from typing import ClassVar

from katapod.model.errors import KatapodError
from katapod.rpc.status import RpcError, StatusCode

__all__ = [
    "AgentFailed",
    "CommandNotExecutable",
    "CommandNotFound",
    "ConsoleIsRaw",
    "ConsoleOff",
    "GuestHangs",
    "command_error",
]


class AgentFailed(KatapodError):
    """The guest agent did not come up, stopped answering, or refused."""


class GuestHangs(AgentFailed):
    """The guest did not boot, or wake, in time."""


class ConsoleOff(KatapodError):
    """The sandbox was started without a debug console."""


class ConsoleIsRaw(KatapodError):
    """The debug console is one of upstream's agent."""


class CommandNotFound(KatapodError):
    exit_code: ClassVar[int] = 127


class CommandNotExecutable(KatapodError):
    exit_code: ClassVar[int] = 126


def command_error(exc: AgentFailed) -> KatapodError:
    """What a failure to create or start a process means to the user."""
    code = exc.context.get("code")
    text = exc.__cause__.message if isinstance(exc.__cause__, RpcError) else str(exc)
    if code is StatusCode.NOT_FOUND:
        return CommandNotFound(text)
    if code is StatusCode.PERMISSION_DENIED:
        return CommandNotExecutable(text)
    if code is StatusCode.INVALID_ARGUMENT:
        return KatapodError(text)
    return exc
