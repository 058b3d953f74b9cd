"""`python -m kit.kvm_host ARGS`: kata-runtime on a host whose /dev/kvm answers, for tests with a kit.kvm_stand_in.

Guests are emulated there, so the proof has the time that an emulated boot takes on a busy machine.
"""

import os
import sys

from katapod.cli.main import main
from katapod.sandbox import proof
from kit.kvm_stand_in import kvm_answers

if __name__ == "__main__":
    if limit := os.environ.get("KVM_HOST_LIMIT_S"):
        proof.KVM_LIMIT_S = float(limit)
        proof.KVM_ALL_S = float(limit)
    with kvm_answers():
        sys.exit(main())
