"""What it means that a machine does not start, or dies: for its user, and for the proof that KVM works."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator

from katapod.model.errors import KatapodError
from katapod.model.layout import Layout
from katapod.sandbox.errors import AgentFailed, GuestHangs
from katapod.sandbox.planning import SandboxPlan
from katapod.sandbox.proof_file import ProofFile
from katapod.sandbox.template_store import TemplateHangs
from katapod.vmm.errors import VmmFailed
from katapod.vmm.judge import BootFailure, Finding
from katapod.vmm.proof import RUNGS
from katapod.vmm.spec import Accelerator, VmSpec

__all__ = ["doubting", "guest_of", "hint_for", "refuse_second_try", "watch_doubts"]

log = logging.getLogger(__name__)


def guest_of(spec: VmSpec) -> str:
    return f"the guest: kernel {spec.kernel}, initrd {spec.initrd}, under {spec.accelerator.value}"


def hint_for(spec: VmSpec) -> str:
    if spec.accelerator is not Accelerator.TCG:
        return f"to find out whether {RUNGS[spec.accelerator]} is the cause, use emulation: --accel tcg"
    return "kata-runtime image build makes kernel and initrd"


def refuse_second_try(plan: SandboxPlan, exc: BaseException | None) -> None:
    """Raise GuestHangs where a guest has reached its limit under KVM: it boots in a second there, or hangs, and a cold
    boot would only reach the limit once more. An emulated guest may have been slow, and gets a second try."""
    if plan.vm.accelerator is not Accelerator.KVM:
        return
    if isinstance(exc, GuestHangs):
        raise exc
    if isinstance(exc, TemplateHangs):
        what, newline, console = str(exc).partition("\n")
        raise GuestHangs(
            f"cannot start sandbox {plan.record.sandbox_id}: the guest does not boot: {what} "
            f"(dial_timeout)\n{guest_of(plan.vm)}{newline}{console}",
            hint=hint_for(plan.vm),
        ) from exc


@contextlib.contextmanager
def doubting(plan: SandboxPlan, layout: Layout) -> Iterator[None]:
    """Around the start of a machine: if it fails as one does under a KVM that does not work, the proof that KVM works
    is dropped. To ask again costs one boot, and a choice that is wrong costs every start."""
    try:
        yield
    except KatapodError as exc:
        if _doubt(plan, layout, exc):
            exc.hint = "; ".join(
                part for part in (exc.hint, f"the next start finds out again whether {_name_of(plan)} works") if part
            )
        raise


def watch_doubts(plan: SandboxPlan, layout: Layout, death: "asyncio.Future[KatapodError]") -> None:
    """The same, for the death of a machine that runs."""

    def died(future: "asyncio.Future[KatapodError]") -> None:
        if not future.cancelled() and future.exception() is None and _doubt(plan, layout, future.result()):
            first_line = str(future.result()).partition("\n")[0]
            log.warning("the next start finds out again whether %s works: %s", _name_of(plan), first_line)

    if plan.proof_key:
        death.add_done_callback(died)


def _name_of(plan: SandboxPlan) -> str:
    return RUNGS[plan.vm.accelerator]


def _doubt(plan: SandboxPlan, layout: Layout, exc: KatapodError) -> bool:
    """Whether a choice was dropped."""
    if not plan.proof_key or not isinstance(exc, VmmFailed | AgentFailed):
        return False
    status = exc.returncode if isinstance(exc, VmmFailed) else None
    if plan.vmm.judge.finding(BootFailure(said=str(exc), status=status)) is Finding.PASSING:
        return False
    return ProofFile(layout.proof_file, plan.record.boot_id).drop(plan.proof_key)
