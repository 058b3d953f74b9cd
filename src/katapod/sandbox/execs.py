"""One more process in a running container, asked for by whoever: this supervisor, or another command through it."""

from msgspec import Struct

from katapod.model import oci
from katapod.model.flags import UserName
from katapod.model.layout import SandboxPaths
from katapod.model.record import ContainerRecord, SandboxRecord
from katapod.plan.container_spec import numeric_user, plan_exec_process
from katapod.rpc.agent import AgentClient
from katapod.rpc.oci_message import process_to_message
from katapod.sandbox.client import start_exec
from katapod.sandbox.stdio import GuestProcess

__all__ = ["ExecRequest", "exec_in", "spec_on_disk"]


class ExecRequest(Struct, frozen=True):
    """What is to run. `env`: entries NAME=VALUE beyond the container's; `cwd`, `user`: empty for the container's.
    `privileged`: with all rights inside the VM."""

    args: tuple[str, ...]
    env: tuple[str, ...] = ()
    cwd: str = ""
    user: UserName | None = None
    tty: bool = False
    console_size: oci.Box | None = None
    privileged: bool = False


def spec_on_disk(paths: SandboxPaths, container_id: str) -> oci.Spec | None:
    """The spec by which a container was made; None if it is gone with its sandbox. Raises SpecError, OSError."""
    path = paths.spec(container_id)
    try:
        return oci.parse_spec(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None


async def exec_in(
    agent: AgentClient, record: SandboxRecord, container_id: str, spec: oci.Spec, request: ExecRequest
) -> GuestProcess:
    """Start a process with environment and rights of the container's, which has this `spec`.

    `agent` may be the sandbox's own channel or a connection to its supervisor's control socket. There is no time limit:
    the supervisor may have many to start before. Raises UsageError, and as start_exec.
    """
    process = plan_exec_process(
        spec,
        request.args,
        env=request.env,
        cwd=request.cwd,
        user=numeric_user(request.user) if request.user else None,
        tty=request.tty,
        console_size=request.console_size,
        privileged=request.privileged,
    )
    ran_as = next((item for item in record.containers if item.container_id == container_id), None)
    return await start_exec(
        agent,
        container_id,
        process_to_message(process),
        user=_who(request, ran_as),
        groups=ran_as.groups if ran_as else (),
        timeout_s=None,
    )


def _who(request: ExecRequest, ran_as: ContainerRecord | None) -> str:
    if request.user is not None:
        return f"{request.user.user}:{request.user.group or ''}".rstrip(":")
    return ran_as.user if ran_as else ""  # a name has no number yet in the spec on this side
