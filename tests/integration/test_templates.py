"""Templates through the library: built, cloned, cancelled at any moment, refused; nothing of an attempt stays."""

import asyncio
import hashlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from msgspec.structs import replace
from vm_helper import (
    INITRD,
    KERNEL,
    QEMU,
    Owned,
    needs_guest_image,
    needs_vm,
    resources,
    sandbox_plan,
    settled,
)

from katapod.host.facts import file_identity
from katapod.host.guest_memory import copy_memory, new_memory, save_memory
from katapod.host.state import StateStore
from katapod.model.errors import KatapodError, NoSpace
from katapod.sandbox.lifecycle import Sandbox, start_sandbox
from katapod.sandbox.planning import SandboxPlan
from katapod.sandbox.template_build import build_template, open_template, prepare_template
from katapod.sandbox.template_store import find_template, list_templates, put_in_place, template_lock
from katapod.sandbox.vmms import DEFAULT_VMM
from katapod.vmm.protocol import VmmLogs
from katapod.vmm.qemu.command_line import FdSlot, plan_qemu
from katapod.vmm.qemu.process import running_qemu
from katapod.vmm.template import FORMAT, TemplateLimits, TemplatePlan, plan_template

pytestmark = [*needs_vm, needs_guest_image, pytest.mark.asyncio(loop_scope="module"), pytest.mark.qemu("templates")]

LIMITS = TemplateLimits(max_age_s=3600.0, max_uses=1000, unused_s=3600.0)


@pytest.fixture
def root() -> Iterator[Path]:
    found = Path(tempfile.mkdtemp(prefix="kt-", dir="/run"))
    yield found
    shutil.rmtree(found)


@pytest.fixture
def small_root(root: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", root], check=True)
    yield root
    subprocess.run(["umount", root], check=True)


def plan_for(store: StateStore, name: str, root: Path, *, agent_timeout_s: float = 60.0) -> SandboxPlan:
    """A sandbox of twice the template's size."""
    plan = sandbox_plan(store.layout, name, agent_timeout_s=agent_timeout_s)
    vm = replace(plan.vm, mem_mib=512, vcpus=2)
    identities = [file_identity(path) for path in (QEMU, KERNEL, INITRD)]
    return replace(plan, vm=vm, template=plan_template(DEFAULT_VMM, vm, identities, root, LIMITS, mem_mib=256))


def template_plan(store: StateStore, root: Path) -> TemplatePlan:
    found = plan_for(store, "any", root).template
    assert found is not None
    return found


@pytest.fixture(scope="module")
def pristine_root() -> Iterator[Path]:
    found = Path(tempfile.mkdtemp(prefix="kt-", dir="/run"))
    yield found
    shutil.rmtree(found)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def template_built(store: StateStore, pristine_root: Path) -> Path:
    """A directory with a template that sandboxes of plan_for are cloned from. Its path is long: sockets lie in it while
    the template is built, whose addresses have room for 107 bytes."""
    before = resources()
    plan = template_plan(store, pristine_root / ("x" * 100))
    assert await prepare_template(plan)
    assert resources() == before
    assert find_and_close(plan)
    return plan.root


@pytest.fixture
def copied(root: Path, template_built: Path) -> Path:
    """The same in a directory of the test's own."""
    subprocess.run(["cp", "-a", "--sparse=always", f"{template_built}/.", root], check=True)
    return root


async def test_a_large_guest_survives_the_zeroing_of_its_memory(store: StateStore, root: Path) -> None:
    """With huge pages, from 512 MiB on, the kernel keeps much more back: 16 MiB to spare were too few."""
    wanted = plan_for(store, "any", root).vm
    vm = replace(wanted, mem_mib=640, max_mem_mib=max(640, wanted.max_mem_mib))
    await build_template(plan_template(DEFAULT_VMM, vm, [], root, LIMITS, mem_mib=640))
    (info,) = list_templates(root)
    assert info.memory_mib == 640
    assert info.size_bytes < 200 << 20  # the rest is as it was, or zero


async def test_what_a_builder_leaves(store: StateStore, template_built: Path) -> None:
    plan = template_plan(store, template_built)
    assert {path.name for path in template_built.iterdir()} == {plan.key, f"{plan.key}.lock"}
    assert {path.name for path in plan.directory.iterdir()} == {"memory", "state", "meta.json", "uses"}
    meta = json.loads((plan.directory / "meta.json").read_text())
    memory = (plan.directory / "memory").stat()
    assert (meta["key"], meta["memory_bytes"], memory.st_size) == (plan.key, 256 << 20, 256 << 20)
    assert meta["state_sha256"] == hashlib.sha256((plan.directory / "state").read_bytes()).hexdigest()
    assert 0 < meta["data_bytes"] <= memory.st_blocks * 512 < 128 << 20  # pages of zeros are left out
    assert plan.directory.stat().st_mode & 0o777 == template_built.stat().st_mode & 0o777 == 0o700


async def test_a_clone_that_has_grown(store: StateStore, template_built: Path) -> None:
    before = resources()
    plan = template_plan(store, template_built)
    with Owned(store, "cloned") as owned:
        sandbox = await start_sandbox(plan_for(store, "cloned", template_built), store)
        try:
            record = store.read("cloned")
            assert (record.template, record.vcpus, record.mem_mib) == (plan.key, 2, 512)
            assert record.vmm_pid == sandbox.vm.pid
            await sandbox.agent.check(timeout_s=60.0)
            command_line = Path(f"/proc/{sandbox.vm.pid}/cmdline").read_text()
            assert "-incoming" in command_line
            assert str(template_built) not in command_line  # a clone holds nothing of the directory: it may go
        finally:
            await sandbox.close()
        assert owned.left() == []
    assert resources() == before


async def test_prepare_only_makes_what_is_missing(store: StateStore, template_built: Path) -> None:
    plan = template_plan(store, template_built)
    before, uses = resources(), list_templates(template_built)[0].uses
    assert not await prepare_template(plan)
    assert list_templates(template_built)[0].uses == uses
    assert resources() == before


async def test_worn_ones_are_to_be_made_again(store: StateStore, template_built: Path) -> None:
    """They are used as long as another holds the lock."""
    plan = template_plan(store, template_built)
    generation = (plan.directory / "memory").stat().st_ino
    with template_lock(plan.root, plan.key) as lock:
        assert lock.try_take()
        for worn in (replace(LIMITS, max_age_s=0.0), replace(LIMITS, max_uses=0)):
            assert await prepare_template(replace(plan, limits=worn))
            async with open_template(replace(plan, limits=worn)) as template:
                assert os.fstat(template.memory_fd).st_ino == generation


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rename_key(path: Path) -> None:
    """The files of another machine below this one's name."""
    path.write_text(json.dumps({**json.loads(path.read_text()), "key": "0" * 24}))


SEEN_AT_ONCE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "memory-cut": ("memory", halve, "its memory file is cut short"),
    "state-flipped": ("state", flip, "its device state is damaged"),
    "meta-cut": ("meta.json", halve, ""),
    "no-memory": ("memory", Path.unlink, "it has no memory"),
    "no-meta": ("meta.json", Path.unlink, "it has no meta.json"),
    "another-key": ("meta.json", rename_key, "it is of another machine"),
}


@pytest.mark.parametrize("damage", SEEN_AT_ONCE)
async def test_damage_that_is_seen_is_to_be_mended(
    damage: str, store: StateStore, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Never a clone: it is made again, for which the lock is needed, which somebody has here."""
    plan = template_plan(store, copied)
    name, harm, words = SEEN_AT_ONCE[damage]
    harm(plan.directory / name)
    before = resources()

    async def use() -> None:
        async with open_template(plan):
            pytest.fail("it was used")

    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    with template_lock(plan.root, plan.key) as lock:
        assert lock.try_take()
        using = asyncio.create_task(use())
        assert await settled(lambda: using.done() or bool(said()))
        assert not using.done()
        using.cancel()
        with pytest.raises(asyncio.CancelledError):
            await using
    (warning,) = said()
    assert warning.startswith(f"cannot use template {plan.directory}: {words}")
    assert warning.endswith("; it is made again")
    assert resources() == before


async def never_run(plan: TemplatePlan) -> None:
    """Sound by all that can be checked, but of a guest that has never run: there is no agent in it."""
    await save_unstarted(plan)


async def zeroed(plan: TemplatePlan) -> None:
    """Its memory is not checked, since that would take longer than a clone does."""
    with (plan.directory / "memory").open("r+b") as memory:
        for _ in range(plan.vm.mem_mib):
            memory.write(bytes(1 << 20))


@pytest.mark.parametrize(
    ("harm", "cause"),
    [(never_run, "the guest does not wake: its agent did not answer within 3 s"), (zeroed, "")],
    ids=["never-run", "zeroed"],
)
async def test_one_that_does_not_work_is_removed(
    harm: Callable[[TemplatePlan], Awaitable[None]],
    cause: str,
    store: StateStore,
    copied: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Then the sandbox boots, or tries to: this one has nothing to boot."""
    template = template_plan(store, copied)
    await harm(template)
    name = f"broken-{harm.__name__.replace('_', '-')}"
    plan = plan_for(store, name, copied, agent_timeout_s=3.0)
    plan = replace(plan, vm=replace(plan.vm, initrd=Path("/none/initrd")))
    before = resources()
    with Owned(store, name) as owned:
        with caplog.at_level(logging.WARNING), pytest.raises(KatapodError, match="/none/initrd"):
            await start_sandbox(plan, store)
        assert owned.left() == []
    told = f"the template {template.key} does not work and is removed; this sandbox boots instead: "
    (warning,) = [record.getMessage() for record in caplog.records if told in record.getMessage()]
    assert cause in warning
    assert not template.directory.exists()
    assert resources() == before


@pytest.mark.parametrize("delay_s", [0.05, 0.5, 1.5, 3.0])
async def test_a_cancelled_build_leaves_nothing(store: StateStore, root: Path, delay_s: float) -> None:
    before = resources()
    plan = template_plan(store, root)
    task = asyncio.create_task(prepare_template(plan))
    await asyncio.wait({task}, timeout=delay_s)
    task.cancel()
    (outcome,) = await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 60)
    if outcome is True or plan.directory.exists():  # it was faster, or was being put in its place
        assert find_and_close(plan)
        assert not [path.name for path in root.iterdir() if path.name.startswith(".")]
    else:
        assert {path.name for path in root.iterdir()} <= {f"{plan.key}.lock"}
    assert resources() == before


async def test_a_build_cancelled_while_memory_is_saved(store: StateStore, root: Path) -> None:
    """The thread that saves works with descriptors that must not be closed, or mean other files, before it ends."""
    before = resources()
    plan = template_plan(store, root)
    task = asyncio.create_task(prepare_template(plan))
    while not task.done() and not any(file.stat().st_blocks for file in root.glob(".*/memory")):  # noqa: ASYNC110
        await asyncio.sleep(0.001)  # there is no event: a file grows
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert {path.name for path in root.iterdir()} == {f"{plan.key}.lock"}
    assert resources() == before


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.1, 0.2, 0.3, 0.5])
async def test_a_cancelled_clone_leaves_nothing(store: StateStore, template_built: Path, delay_s: float) -> None:
    before = resources()
    name = f"cancelled-{int(delay_s * 1000)}"
    with Owned(store, name) as owned:
        task = asyncio.create_task(start_sandbox(plan_for(store, name, template_built), store))
        await asyncio.wait({task}, timeout=delay_s)
        task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(result, Sandbox):
            await result.close()
        else:
            assert isinstance(result, asyncio.CancelledError)
        assert owned.left() == []
    assert resources() == before
    assert find_and_close(template_plan(store, template_built))  # none the worse for it


def find_and_close(plan: TemplatePlan) -> bool:
    found = find_template(plan)
    if found is not None:
        found.close()
    return found is not None


async def test_memory_that_does_not_fit(small_root: Path) -> None:
    source = new_memory(16)
    target = os.open(small_root / "memory", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(source, os.urandom(8 << 20), 0)
        with pytest.raises(NoSpace, match="cannot save the template's memory: No space left on device"):
            save_memory(source, target, 16)
        with pytest.raises(NoSpace, match="cannot copy the template's memory: No space left on device"):
            copy_memory(source, target)
    finally:
        os.close(source)
        os.close(target)


async def save_unstarted(plan: TemplatePlan) -> None:
    """A template of the machine of `plan` before its first instruction."""
    scratch = plan.root / f".{plan.key}.test"
    vm_dir = scratch / "vm"
    vm_dir.mkdir(parents=True)
    memory = new_memory(plan.vm.mem_mib)
    target = os.open(scratch / "memory", os.O_RDWR | os.O_CREAT)
    try:
        qemu = plan_qemu(replace(plan.vm, vm_dir=vm_dir))
        logs = VmmLogs(vm_dir / "console.log", vm_dir / "vmm.log")
        async with running_qemu(qemu, logs, given={FdSlot.MEMORY: memory}) as vm:
            await vm.save_state(scratch / "state")
            data_bytes = save_memory(memory, target, plan.vm.mem_mib)
    finally:
        os.close(memory)
        os.close(target)
    meta = {
        "format": FORMAT,
        "key": plan.key,
        "created_at": time.time(),
        "memory_bytes": plan.vm.mem_mib << 20,
        "data_bytes": data_bytes,
        "state_sha256": hashlib.sha256((scratch / "state").read_bytes()).hexdigest(),
        "description": "never run",
    }
    (scratch / "meta.json").write_text(json.dumps(meta))
    (scratch / "uses").touch()
    shutil.rmtree(vm_dir)
    put_in_place(scratch, plan)
