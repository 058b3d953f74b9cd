# The public names for type checkers: __init__.py loads them when they are first used.

from katapod.api.container import Container as Container
from katapod.api.container import run as run
from katapod.api.image import Image as Image
from katapod.api.info import ContainerInfo as ContainerInfo
from katapod.api.info import SandboxInfo as SandboxInfo
from katapod.api.options import ContainerOptions as ContainerOptions
from katapod.api.options import ImageSource as ImageSource
from katapod.api.options import Options as Options
from katapod.api.options import SandboxOptions as SandboxOptions
from katapod.api.process import CommandFailed as CommandFailed
from katapod.api.process import Completed as Completed
from katapod.api.process import Process as Process
from katapod.api.sandbox import Sandbox as Sandbox
from katapod.api.streams import PIPE as PIPE
from katapod.host.own_mounts import leave_host_mounts as leave_host_mounts
from katapod.images.errors import ImageError as ImageError
from katapod.model.errors import AlreadyExists as AlreadyExists
from katapod.model.errors import ConfigError as ConfigError
from katapod.model.errors import HostLacks as HostLacks
from katapod.model.errors import InvalidState as InvalidState
from katapod.model.errors import KatapodError as KatapodError
from katapod.model.errors import NoSpace as NoSpace
from katapod.model.errors import NotFound as NotFound
from katapod.model.errors import UsageError as UsageError
from katapod.model.mount_flags import Volume as Volume
from katapod.model.record import State as State
from katapod.sandbox.errors import AgentFailed as AgentFailed
from katapod.sandbox.errors import CommandNotExecutable as CommandNotExecutable
from katapod.sandbox.errors import CommandNotFound as CommandNotFound

__version__: str
__all__: list[str]
_PLACES: dict[str, str]
