"""Making a template: boot its guest, have it settle, save it. Built on first use by one of those who want it."""

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from msgspec.structs import replace

from katapod.host.guest_memory import new_memory, save_memory
from katapod.host.logs import read_tail
from katapod.host.trace import span
from katapod.model.errors import KatapodError, NoSpace
from katapod.rpc.status import RpcError
from katapod.sandbox.agent_link import claim_channel, claim_user, connect_agent
from katapod.sandbox.clock import ClockKeeper
from katapod.sandbox.guard import CAUSE_LIMIT_S
from katapod.sandbox.patience import patient_timeout
from katapod.sandbox.template_store import (
    Template,
    TemplateBroken,
    TemplateHangs,
    TemplateLock,
    TemplateMeta,
    find_template,
    put_in_place,
    sweep_templates,
    template_lock,
)
from katapod.tasks import beside, finish
from katapod.vmm.protocol import Handed, VirtualMachine, VmmLogs
from katapod.vmm.spec import Accelerator, VmSpec
from katapod.vmm.template import FORMAT, TemplatePlan

__all__ = ["build_template", "open_template", "prepare_template"]

log = logging.getLogger(__name__)

WAIT_LIMIT_S = 120.0  # for another who builds
SETTLE_LIMIT_S = 60.0  # for the agent to get its guest ready to be saved
LOCK_POLL_S = 0.02
SPARE_MIB = 64  # left free where templates lie: on a tmpfs that is the host's memory
PACKING = 4  # a template's file takes less than this part of its guest's memory


@contextlib.asynccontextmanager
async def open_template(plan: TemplatePlan) -> AsyncIterator[Template]:
    """The template, opened; made first if there is none, if it is worn, or damaged.

    Only one process builds. The others wait for it, or go on with the worn one. Raises TemplateBroken, NoSpace.
    """
    template = _find_sound(plan)
    if template is None or template.is_worn(plan):
        template = await _renew(plan, template)
    template.count_use()
    try:
        yield template
    finally:
        template.close()


async def prepare_template(plan: TemplatePlan) -> bool:
    """Have the template ready for the next who wants it; returns whether one was missing, worn or damaged.

    Raises TemplateBroken, NoSpace.
    """
    template = _find_sound(plan)
    missing = template is None or template.is_worn(plan)
    if missing:
        template = await _renew(plan, template)
    if template is not None:
        template.close()
    return missing


def _find_sound(plan: TemplatePlan, level: int = logging.WARNING) -> Template | None:
    try:
        return find_template(plan)
    except TemplateBroken as exc:
        log.log(level, "%s; it is made again", exc)
        return None


async def _renew(plan: TemplatePlan, worn: Template | None) -> Template:
    """A fresh template; `worn` is closed, or returned if there is no other."""
    renewed = None
    try:
        renewed = await _take_turn(plan, worn)
        return renewed
    finally:
        if worn is not None and worn is not renewed:
            worn.close()


async def _take_turn(plan: TemplatePlan, worn: Template | None) -> Template:
    """Build, or wait for who builds; `worn` if that is no use."""
    with template_lock(plan.root, plan.key) as lock:
        began = time.monotonic()
        if not lock.try_take():
            if worn is not None:
                return worn
            await _wait_for_builder(plan, lock)
        fresh = _find_sound(plan, logging.DEBUG)  # somebody may have built it while we waited
        if fresh is not None:
            if not fresh.is_worn(plan):
                return fresh
            fresh.close()
        elif plan.vm.accelerator is Accelerator.KVM and time.monotonic() - began > plan.limits.boot_s:
            # under KVM a boot takes a second or hangs: not each of those who waited has to see that again
            limit = f"{plan.limits.boot_s:g} s"
            raise TemplateHangs(
                f"cannot make a template in {plan.root}: its guest did not boot for others within {limit}"
            )
        try:
            await build_template(plan)
        except KatapodError as exc:
            if worn is None:
                raise
            log.warning("%s; the old one is used", str(exc).partition("\n")[0])
            return worn
        fresh = find_template(plan)
    if fresh is None:
        raise TemplateBroken(f"cannot use template {plan.directory}: it was removed at once")
    return fresh


async def _wait_for_builder(plan: TemplatePlan, lock: TemplateLock) -> None:
    """Take the lock once it is free. Raises TemplateBroken."""
    try:
        async with patient_timeout(WAIT_LIMIT_S, _Builder(plan)) as patience:
            while not lock.try_take():  # noqa: ASYNC110 - nobody tells when a lock becomes free
                await asyncio.sleep(LOCK_POLL_S)
    except TimeoutError as exc:
        limit = f"{WAIT_LIMIT_S:g} s{patience.left_out()}"
        raise TemplateBroken(f"cannot wait for template {plan.key}: it is not built within {limit}") from exc


class _Builder:
    """The process that makes the template, seen from another one: the VM is its child."""

    def __init__(self, plan: TemplatePlan) -> None:
        self._plan = plan

    @property
    def pid(self) -> int:
        for scratch in self._plan.root.glob(_scratch_of(self._plan, "*")):
            pid = scratch.suffix.removeprefix(".")
            if pid.isdecimal():
                return int(pid)
        return 0


def _scratch_of(plan: TemplatePlan, pid: int | str) -> str:
    return f".{plan.key}.{pid}"


async def build_template(plan: TemplatePlan) -> None:
    """Make the template and put it in place. The caller holds its lock.

    Raises TemplateBroken, NoSpace; then nothing of it is left, and an older one stays.
    """
    sweep_templates(plan)
    scratch = plan.root / _scratch_of(plan, os.getpid())
    try:
        scratch.mkdir(mode=0o700)
        needed_mib = SPARE_MIB + plan.vm.mem_mib // PACKING
        free_mib = shutil.disk_usage(plan.root).free >> 20
        if free_mib < needed_mib:
            raise NoSpace(f"cannot make a template in {plan.root}: {free_mib} MiB are free, {needed_mib} are needed")
        with span("build template"):
            await _save_guest(plan, scratch)
        await finish(asyncio.to_thread(put_in_place, scratch, plan))  # never half of it, and then the scratch goes
    except NoSpace:
        raise
    except TemplateHangs as exc:
        raise TemplateHangs(f"cannot make a template in {plan.root}: {exc}") from exc
    except (KatapodError, RpcError, OSError) as exc:
        raise TemplateBroken(f"cannot make a template in {plan.root}: {exc}") from exc
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


async def _save_guest(plan: TemplatePlan, scratch: Path) -> None:
    vm_dir = scratch / "vm"
    vm_dir.mkdir(mode=0o700)
    logs = VmmLogs(vm_dir / "console.log", vm_dir / "vmm.log")
    with contextlib.ExitStack() as stack:
        memory = new_memory(plan.vm.mem_mib)
        stack.callback(os.close, memory)
        target = os.open(scratch / "memory", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, target)
        given = {Handed.MEMORY: memory}
        spec = claim_channel(replace(plan.vm, vm_dir=vm_dir), given, stack)
        spec = claim_user(spec, plan.vmm.capabilities(spec), stack)
        async with plan.vmm.start(spec, logs, given=given) as vm:
            await vm.run()
            await _settle_guest(vm, spec, plan.limits.boot_s)
            await vm.save_state(scratch / "state")
            # to its end: a thread goes on when we are cancelled, and these descriptors would soon mean other files
            data_bytes = await finish(asyncio.to_thread(save_memory, memory, target, plan.vm.mem_mib))
    meta = TemplateMeta(
        format=FORMAT,
        key=plan.key,
        created_at=time.time(),
        memory_bytes=plan.vm.mem_mib << 20,
        data_bytes=data_bytes,
        state_sha256=hashlib.sha256((scratch / "state").read_bytes()).hexdigest(),
        description=plan.describe(),
    )
    (scratch / "meta.json").write_bytes(msgspec.json.format(msgspec.json.encode(meta), indent=1))
    (scratch / "uses").touch(mode=0o600)
    shutil.rmtree(vm_dir)
    log.info("template %s holds %d MiB of memory", plan.key, data_bytes >> 20)


async def _settle_guest(vm: VirtualMachine, spec: VmSpec, boot_s: float) -> None:
    """Wait for the agent, and have it get ready to be saved. Raises TemplateBroken, VmmFailed, RpcError."""
    wait, settle = vm.wait_end(), _settle(vm, spec, boot_s)
    async with beside(wait, name="wait-template") as ended, beside(settle, name="settle") as work:
        await asyncio.wait({ended, work}, return_when=asyncio.FIRST_COMPLETED)
        if work.done() and isinstance(work.exception(), RpcError):
            # a channel that breaks may be the first sign of a VMM that ends: its end is the cause to be told
            await asyncio.wait({ended}, timeout=CAUSE_LIMIT_S)
        if ended.done():
            raise vm.explain_end()
        work.result()


async def _settle(vm: VirtualMachine, spec: VmSpec, boot_s: float) -> None:
    step, limit_s = "boot", boot_s
    agent = None
    try:
        async with patient_timeout(boot_s, vm) as patience:
            agent = await connect_agent(vm, spec, "agent of a template")
            await agent.check(timeout_s=None)
            clock = ClockKeeper(agent, "a template")
            await clock.look()
        step, limit_s = "settle", SETTLE_LIMIT_S
        async with patient_timeout(SETTLE_LIMIT_S, vm) as patience:
            await agent.settle(zero_free_memory=True, timeout_s=None)
            await clock.look()  # all clones would have its rate
    except TimeoutError as exc:
        said = read_tail(vm.logs.console)
        kind = TemplateHangs if step == "boot" else TemplateBroken
        raise kind(
            f"its guest did not {step} within {limit_s:g} s{patience.left_out()}"
            + (f"\nlast lines of the guest's console:\n{said}" if said else "; its console is silent")
        ) from exc
    finally:
        if agent is not None:
            agent.connection.close()
