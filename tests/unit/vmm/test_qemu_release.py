"""Which QEMU may run emulated virtual CPUs at a time."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from katapod.vmm.qemu.command_line import QemuPlan, plan_qemu
from katapod.vmm.qemu.release import on_one_thread, parse_release, with_sound_threads
from katapod.vmm.spec import Accelerator, VmSpec
from kit.vm_values import SMALL_VM

EMULATED = plan_qemu(SMALL_VM)  # one virtual CPU, and room for three more
SILENT = ""


def program_that_says(folder: Path, text: str) -> str:
    path = folder / "qemu"
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)
    return str(path)


def accelerator_of(plan: QemuPlan) -> str:
    return next(option.value for option in plan.options if option.switch == "-accel")


@pytest.mark.parametrize(
    ("said", "accelerator"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)", "tcg,thread=single"),
        ("QEMU emulator version 8.0.4", "tcg,thread=single"),
        ("QEMU emulator version 8.1.0", "tcg"),
        ("QEMU emulator version 10.0.8 (Debian 1:10.0.8+ds-0+deb13u1)", "tcg"),
        (SILENT, "tcg,thread=single"),
    ],
)
async def test_before_8_1_all_emulated_cpus_have_one_thread(said: str, accelerator: str, tmp_path: Path) -> None:
    plan = await with_sound_threads(EMULATED, program_that_says(tmp_path, said))
    assert accelerator_of(plan) == accelerator


async def test_what_cannot_be_asked_has_one_thread(tmp_path: Path) -> None:
    assert accelerator_of(await with_sound_threads(EMULATED, str(tmp_path / "none"))) == "tcg,thread=single"


@pytest.mark.parametrize(
    "spec",
    [replace(SMALL_VM, max_vcpus=1), replace(SMALL_VM, accelerator=Accelerator.KVM)],
    ids=["one CPU for ever", "KVM"],
)
async def test_nobody_is_asked_where_it_does_not_matter(spec: VmSpec, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    program = program_that_says(tmp_path, f"' > {asked} '")
    plan = plan_qemu(spec)
    assert await with_sound_threads(plan, program) is plan
    assert not asked.exists()


def test_nothing_else_of_the_command_line_changes() -> None:
    plan = plan_qemu(replace(SMALL_VM, translation_cache_mib=64))
    before, after = plan.describe().splitlines(), on_one_thread(plan).describe().splitlines()
    changed = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    assert changed == [("  -accel tcg,tb-size=64", "  -accel tcg,tb-size=64,thread=single")]


@pytest.mark.parametrize("text", ["", "version", "version 7", "version 12345.1", "qemu 7.2"])
def test_no_version(text: str) -> None:
    assert parse_release(text) == (0, 0)
