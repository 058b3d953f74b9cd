"""`python -m kit.kvm_host ARGS`: kata-runtime on a host whose /dev/kvm answers and that has no User-mode Linux, for
tests with a kit.kvm_stand_in.

Guests are emulated there, so the proof has the time that an emulated boot takes on a busy machine.
"""

import os
import sys

from katapod.cli.main import main
from katapod.sandbox import proof
from katapod.vmm.spec import Accelerator
from kit.kvm_stand_in import kvm_answers

if __name__ == "__main__":
    if limit := os.environ.get("KVM_HOST_LIMIT_S"):
        proof.FIRST_LIMIT_S = float(limit)
        proof.ALL_LIMIT_S = float(limit)
    vars(proof)["LADDER"] = (Accelerator.KVM, Accelerator.TCG)
    with kvm_answers():
        sys.exit(main())
