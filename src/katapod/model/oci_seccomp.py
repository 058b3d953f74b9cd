"""linux.seccomp of the OCI runtime specification, as frozen values.

Source: opencontainers/runtime-spec, config-linux.md, "Seccomp"; seccomp(2).
"""

from katapod.model.oci_json import U32, U64, Part, impossible

__all__ = ["SECCOMP_NOTIFY", "Seccomp", "SeccompArg", "Syscall", "check_seccomp"]


class SeccompArg(Part, frozen=True, kw_only=True):
    index: U64
    value: U64
    value_two: U64 = 0
    op: str


class Syscall(Part, frozen=True, kw_only=True):
    names: tuple[str, ...]
    action: str
    errno_ret: U32 | None = None
    args: tuple[SeccompArg, ...] = ()


class Seccomp(Part, frozen=True, kw_only=True):
    default_action: str
    default_errno_ret: U32 | None = None
    architectures: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    syscalls: tuple[Syscall, ...] = ()
    listener_path: str = ""
    """Refused, as are `listener_metadata` and SECCOMP_NOTIFY: who would answer is on the host."""
    listener_metadata: str = ""


SECCOMP_NOTIFY = "SCMP_ACT_NOTIFY"


def check_seccomp(seccomp: Seccomp, where: str, path: str) -> None:
    """Refuse what asks a process of the host: the system calls are those of the guest's kernel. Raises SpecError."""
    prefix = f"{path}." if path else ""
    actions = ((f"{prefix}syscalls[{index}].action", rule.action) for index, rule in enumerate(seccomp.syscalls))
    for name, action in ((f"{prefix}defaultAction", seccomp.default_action), *actions):
        if action == SECCOMP_NOTIFY:
            raise impossible(where, name, f"no process of the host can answer the calls of a guest ({action})")
    for name, value in (("listenerPath", seccomp.listener_path), ("listenerMetadata", seccomp.listener_metadata)):
        if value:
            raise impossible(where, f"{prefix}{name}", "no process of the host can answer the calls of a guest")
