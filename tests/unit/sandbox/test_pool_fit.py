"""Which sandboxes a machine of the pool can become."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec import structs

from katapod.host.facts import HostFacts
from katapod.host.state import StateStore
from katapod.model.config import Config
from katapod.model.layout import Layout
from katapod.model.sizing import ContainerLimits
from katapod.plan.virtiofsd import VirtiofsdImplementation
from katapod.sandbox.planning import SandboxPlan, plan_ready_machine, plan_sandbox, size_for
from katapod.sandbox.pool import ReadyMachine, new_machine_id
from katapod.sandbox.release import ReleaseStack
from katapod.sandbox.start_record import new_record
from katapod.vmm.spec import Accelerator

FACTS = HostFacts(cpus=4, mem_mib=8192, kvm=True, vhost_vsock=False, boot_id="b", kernel_release="6")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name in ("qemu", "kernel", "initrd", "linux", "disk"):
        (tmp_path / name).write_text(name)
    found = changed(Config(), "uml", kernel=str(tmp_path / "linux"), image=str(tmp_path / "disk"))
    return changed(
        found, "qemu", path=str(tmp_path / "qemu"), kernel=str(tmp_path / "kernel"), initrd=str(tmp_path / "initrd")
    )


def changed(config: Config, table: str, **keys: Any) -> Config:
    section = msgspec.structs.replace(getattr(config, table), **keys)
    return msgspec.structs.replace(config, **{table: section})


def ready(
    config: Config, accelerator: Accelerator = Accelerator.TCG, lock: int = 7, netns: int | None = None
) -> ReadyMachine:
    record = new_record(new_machine_id(), FACTS, auto_remove=True)
    plan = plan_ready_machine(
        record, config, FACTS, Layout(), accelerator=accelerator, implementation=VirtiofsdImplementation.C
    )
    machine: Any = SimpleNamespace(mem_mib=plan.vm.mem_mib, spec=SimpleNamespace(vcpus=plan.vm.vcpus))
    return ReadyMachine(plan, StateStore(Layout()), machine, ReleaseStack(), lock, netns)


def wanted(config: Config, limits: ContainerLimits, **more: Any) -> SandboxPlan:
    return plan_sandbox(
        new_record("c1", FACTS, auto_remove=False, labels={"a": "b"}),
        config,
        FACTS,
        Layout(),
        accelerator=more.get("accelerator", Accelerator.TCG),
        implementation=VirtiofsdImplementation.C,
        size=size_for(config, FACTS, (limits,)),
        hostname="other",
        shm_size_bytes=1 << 20,
        netns=more.get("netns"),
    )


def test_fits_whatever_the_limits_are(config: Config) -> None:
    for limits in (
        ContainerLimits(),
        ContainerLimits(memory_bytes=32 << 20),
        ContainerLimits(memory_bytes=2 << 30, cpus=3.5),
    ):
        assert ready(config).fits(wanted(config, limits))


@pytest.mark.parametrize("templates", [True, False])
def test_with_and_without_templates(config: Config, templates: bool) -> None:
    mine = changed(config, "factory", enable_template=templates)
    other = changed(config, "factory", enable_template=not templates)
    assert ready(mine).fits(wanted(mine, ContainerLimits()))
    assert not ready(mine).fits(wanted(other, ContainerLimits()))


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("qemu", "kernel_params", "quiet"),
        ("qemu", "default_maxvcpus", 2),
        ("qemu", "virtio_fs_cache", "never"),
        ("qemu", "virtio_fs_queue_size", 128),
        ("agent", "kernel_modules", ("loop",)),
        ("agent", "debug_console_enabled", True),
        ("katapod", "console_log_kib", 8),
    ],
)
def test_another_configuration_does_not_fit(config: Config, table: str, key: str, value: object) -> None:
    assert not ready(config).fits(wanted(changed(config, table, **{key: value}), ContainerLimits()))


def test_another_accelerator_or_initrd_does_not_fit(config: Config) -> None:
    machine = ready(config)
    assert not machine.fits(wanted(config, ContainerLimits(), accelerator=Accelerator.KVM))
    Path(config.qemu.initrd).write_text("a new one")
    assert not machine.fits(wanted(config, ContainerLimits()))


def test_a_machine_cannot_shrink(config: Config) -> None:
    plan = wanted(config, ContainerLimits())
    machine = ready(config)
    small = structs.replace(plan, vm=structs.replace(plan.vm, mem_mib=machine.machine.mem_mib - 128))
    assert not machine.fits(small)


def test_what_is_taken_does_not_fit_again(config: Config) -> None:
    assert not ready(config, lock=-1).fits(wanted(config, ContainerLimits()))


def test_without_its_files_nothing_fits(config: Config) -> None:
    Path(config.qemu.initrd).unlink()
    assert not ready(config).fits(wanted(config, ContainerLimits()))


def uml(config: Config, limits: ContainerLimits, **more: Any) -> SandboxPlan:
    return wanted(config, limits, accelerator=Accelerator.UML, **more)


def test_a_machine_that_cannot_grow_has_the_usual_size(config: Config) -> None:
    machine = ready(config, Accelerator.UML)
    usual = uml(config, ContainerLimits())
    assert machine.machine.mem_mib == usual.vm.mem_mib > config.katapod.template_memory
    assert machine.fits(usual)
    for other in (ContainerLimits(memory_bytes=32 << 20), ContainerLimits(memory_bytes=3 << 30)):
        assert not machine.fits(uml(config, other))
    assert not machine.fits(wanted(config, ContainerLimits()))
    Path(config.uml.image).write_text("a new one")
    assert not machine.fits(uml(config, ContainerLimits()))


def test_a_vmm_that_opens_taps_itself_has_to_be_in_the_sandboxes_namespace(config: Config, tmp_path: Path) -> None:
    namespaces = [tmp_path / name for name in ("mine", "other")]
    for path in namespaces:
        path.touch()
    with namespaces[0].open() as mine:
        machine = ready(config, Accelerator.UML, netns=mine.fileno())
        fits = [machine.fits(uml(config, ContainerLimits(), netns=path)) for path in (None, *namespaces)]
    assert fits == [True, True, False]
