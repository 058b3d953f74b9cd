"""The OCI hooks of a container that are the host's: they run beside the VM, where the engine expects them.

`prestart` and `createRuntime` after the container has been created, `poststart` after its start, `poststop` after its
removal; nerdctl and Docker set up networks in them. `createContainer` and `startContainer` would run in the
container's own namespaces, which are the guest's, where the host's programs are not: they are left out, as they are
upstream.
Source: OCI runtime-spec, config.md (POSIX-platform Hooks) and runtime.md (State).
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from katapod.host.process import ProcessFailed, run
from katapod.model.errors import KatapodError
from katapod.model.oci import Hook, Hooks, Spec
from katapod.version import OCI_VERSION

__all__ = ["HookedContainer"]

log = logging.getLogger(__name__)

LIMIT_S = 60.0  # of a hook that names none: nothing may wait for ever


class HookedContainer(Struct, frozen=True):
    """What hooks are told. `pid`: of a process in the sandbox's network namespace: the VMM, or the container's proxy.
    Without a bundle, none."""

    container_id: str
    bundle: Path | None
    spec: Spec

    @property
    def _hooks(self) -> Hooks:
        return (self.spec.hooks if self.bundle is not None else None) or Hooks()

    @property
    def set_up_network(self) -> bool:
        """Whether there are hooks in which engines do so."""
        return bool(self._hooks.prestart or self._hooks.create_runtime)

    async def created(self, pid: int) -> None:
        """Raises HookFailed: then the container must not start."""
        left_out = [*self._hooks.create_container, *self._hooks.start_container]
        if left_out:
            log.warning(
                "%s: hooks that belong into the container are not run: %s",
                self.container_id,
                ", ".join(hook.path for hook in left_out),
            )
        await self._run("prestart", self._hooks.prestart, pid, "created")
        await self._run("createRuntime", self._hooks.create_runtime, pid, "created")

    async def started(self, pid: int) -> None:
        """What fails is only logged, as the specification wants it."""
        await self._run_logged("poststart", self._hooks.poststart, pid, "running")

    async def stopped(self) -> None:
        """What fails is only logged."""
        await self._run_logged("poststop", self._hooks.poststop, 0, "stopped")

    async def _run_logged(self, kind: str, hooks: Sequence[Hook], pid: int, status: str) -> None:
        for hook in hooks:  # each, whatever became of the one before
            try:
                await self._run(kind, [hook], pid, status)
            except KatapodError as exc:
                log.warning("%s: %s", self.container_id, exc)

    async def _run(self, kind: str, hooks: Sequence[Hook], pid: int, status: str) -> None:
        state: dict[str, object] = {
            "ociVersion": OCI_VERSION,
            "id": self.container_id,
            "status": status,
            **({"pid": pid} if pid else {}),
            "bundle": str(self.bundle),
            "annotations": self.spec.annotations,
        }
        for hook in hooks:
            log.info("%s: hook %s: %s", self.container_id, kind, hook.path)
            environment = dict(entry.split("=", 1) for entry in hook.env if "=" in entry)
            try:
                await run(
                    hook.args or (hook.path,),
                    executable=hook.path,
                    only_env=environment,
                    input=msgspec.json.encode(state),
                    timeout_s=float(hook.timeout) if hook.timeout else LIMIT_S,
                    cwd=self.bundle,
                )
            except ProcessFailed as exc:
                why = f"{exc.status}: {exc.stderr.strip()[-500:]}".rstrip(": ")
                raise HookFailed(f"cannot run the {kind} hook {hook.path} of {self.container_id}: {why}") from exc
            except KatapodError as exc:
                raise HookFailed(f"cannot run the {kind} hook {hook.path} of {self.container_id}: {exc}") from exc


class HookFailed(KatapodError):
    """A hook ended with a status other than zero, not in time, or is no program."""
