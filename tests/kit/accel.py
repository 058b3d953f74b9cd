"""The dimension "accelerator" of the tests on real VMs: what `auto` gives, QEMU, or both.

KATAPOD_TEST_ACCEL (kvm, uml or tcg) forces one for all. Without it a test runs by what `auto` takes on this machine
(`make setup` finds out), unless it is marked `qemu`, with the reason, or `core`, by which it runs on each VMM. The
fixture `accelerator` (kit.accel_fixtures) sets KATAPOD_ACCELERATOR, so that a test need not say `--accel`. What is
about one accelerator names it.
"""

import os

import pytest

from katapod.host.facts import collect_host_facts
from katapod.model.config import load_config
from katapod.model.layout import Layout
from katapod.sandbox.proof import NoGuestImage, kept_choice
from katapod.sandbox.vmms import LADDER
from katapod.vmm.proof import AcceleratorChoice
from katapod.vmm.spec import NO_REMEDY, Accelerator, CpuRemedy

__all__ = [
    "ACCELERATOR",
    "FORCED",
    "QEMU_ACCELERATOR",
    "REMEDY",
    "VARIABLE",
    "accelerators_for",
    "current_accelerator",
    "vmm_name",
]

VARIABLE = "KATAPOD_ACCELERATOR"
FORCED = os.environ.get("KATAPOD_TEST_ACCEL", "")


def _proven() -> dict[Accelerator, AcceleratorChoice]:
    """What this machine is known to boot guests under, best first."""
    config, facts, file = load_config().config, collect_host_facts(), Layout().proof_file
    found = {}
    for rung in LADDER:
        try:
            known = kept_choice(config, facts, file, rung) if rung is not Accelerator.TCG else None
        except (OSError, NoGuestImage):  # there is no guest image yet
            continue
        if known is not None and known.accelerator is rung:
            found[rung] = known
    return found


def _choose(proven: dict[Accelerator, AcceleratorChoice]) -> tuple[Accelerator, Accelerator, CpuRemedy]:
    """What tests run by, what those run by that need QEMU, and what of its CPU has to differ."""
    assert FORCED in ("", "kvm", "uml", "tcg"), f"KATAPOD_TEST_ACCEL is {FORCED}; known are kvm, uml and tcg"
    kvm = FORCED == "kvm" or (FORCED != "tcg" and Accelerator.KVM in proven)
    qemu = Accelerator.KVM if kvm else Accelerator.TCG
    remedy = proven[qemu].remedy if qemu in proven else NO_REMEDY
    return (Accelerator(FORCED) if FORCED else next(iter(proven), Accelerator.TCG)), qemu, remedy


PROVEN = _proven()
ACCELERATOR, QEMU_ACCELERATOR, REMEDY = _choose(PROVEN)


def accelerators_for(definition: pytest.Item) -> list[str | None]:
    """What a test is run by, one after the other; None, and an empty list: what `auto` gives. That comes last, and so
    beside the tests without a marker, which share a module's sandboxes with it."""
    if definition.get_closest_marker("qemu") and ACCELERATOR is Accelerator.UML:
        return [QEMU_ACCELERATOR.value]
    if definition.get_closest_marker("core") and Accelerator.UML in PROVEN and not FORCED:
        both = (Accelerator.UML, QEMU_ACCELERATOR)
        return [next(each.value for each in both if each is not ACCELERATOR), None]
    return []


def current_accelerator() -> str:
    """What the test that runs has."""
    return os.environ[VARIABLE]


def vmm_name() -> str:
    """What messages call its VMM."""
    return "User-mode Linux" if current_accelerator() == Accelerator.UML.value else "QEMU"
