"""The dimension "accelerator": all tests on real VMs run under KATAPOD_TEST_ACCEL, which is kvm or tcg.

Without it: kvm where this machine is known to boot guests under it (`make setup` finds out), else tcg. Tests say
`--accel ACCEL`, or nothing: conftest.py sets KATAPOD_ACCELERATOR for them. What is about one accelerator names it.
"""

import os

from katapod.host.facts import collect_host_facts
from katapod.model.config import load_config
from katapod.model.layout import Layout
from katapod.sandbox.proof import kept_verdict
from katapod.vmm.proof import Verdict
from katapod.vmm.spec import NO_REMEDY, Accelerator, CpuRemedy

__all__ = ["ACCEL", "ACCELERATOR", "REMEDY"]


def _known() -> Verdict | None:
    try:
        return kept_verdict(load_config().config, collect_host_facts(), Layout().proof_file)
    except OSError:  # there is no guest image yet
        return None


def _choose() -> tuple[Accelerator, CpuRemedy]:
    known, wanted = _known(), os.environ.get("KATAPOD_TEST_ACCEL", "")
    assert wanted in ("", "kvm", "tcg"), f"KATAPOD_TEST_ACCEL is {wanted}; known are kvm and tcg"
    works = known is not None and known.accelerator is Accelerator.KVM
    if wanted == "tcg" or not (wanted or works):
        return Accelerator.TCG, NO_REMEDY
    return Accelerator.KVM, known.remedy if known is not None else NO_REMEDY


ACCELERATOR, REMEDY = _choose()
ACCEL = ACCELERATOR.value
