"""A QEMU that takes the command line of KVM and emulates: what Katapod does on a host with KVM, on one without.

`KvmStandIn` is a program to name as QEMU's path. It notes each start, and fails under KVM as its rules say, in the
manner of real hosts.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

from katapod.host import facts

__all__ = ["ARCH_CAPABILITIES", "KvmStandIn", "Rule", "kvm_answers"]

QEMU = "/usr/bin/qemu-system-x86_64"

PROGRAM = r"""#!/usr/bin/python3 -IS
import fcntl, json, os, re, signal, sys, time

arguments, base = sys.argv[1:], "BASE"
line = " ".join(arguments)
with open(base + ".log", "a") as log:
    fcntl.flock(log, fcntl.LOCK_EX)
    log.write(json.dumps(arguments) + "\n")
kvm = "-accel kvm" in line
hang = False
with open(base + ".rules", "r+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    rules = json.load(file)
    for rule in rules if kvm else []:
        if rule["times"] == 0 or not re.search(rule["match"], line) or re.search(rule["unless"], line):
            continue
        if rule["times"] > 0:
            rule["times"] -= 1
            file.seek(0)
            file.truncate()
            json.dump(rules, file)
            file.flush()
        if rule["say"]:
            print("qemu-system-x86_64: " + rule["say"], file=sys.stderr, flush=True)
        if rule["hang"]:
            hang = True
            break
        if rule["status"] < 0:
            signal.signal(-rule["status"], signal.SIG_DFL)
            os.kill(os.getpid(), -rule["status"])
        os._exit(rule["status"])
changed, skip = [], False
for number, argument in enumerate(arguments):
    if skip:
        skip = False
        continue
    before = arguments[number - 1] if number else ""
    if kvm and argument == "-global" and arguments[number + 1].startswith("kvm-pit"):
        skip = True
        continue
    if kvm and before == "-accel":
        argument = "tcg"
    elif kvm and before == "-cpu":
        argument = "max,la57=off,erms=off,fsrm=off"
    elif hang and before == "-append":
        argument = "console=ttyS0 rdinit=/none panic=0 quiet"
    changed.append(argument)
os.execv("QEMU", ["QEMU", *changed])
"""


@dataclass(frozen=True)
class Rule:
    """How KVM fails where its command line has `match` and not `unless`: the first rule that fits counts."""

    match: str = "-accel kvm"
    unless: str = "^$"
    say: str = ""
    status: int = 1  # negative: a signal
    hang: bool = False  # the guest never gets to its agent
    times: int = -1  # how often; -1: always


ARCH_CAPABILITIES = Rule(
    unless=r"arch-capabilities=off|-cpu [^h]",
    say="error: failed to set MSR 0x10a to 0x69\n"
    "qemu-system-x86_64: ../target/i386/kvm/kvm.c:3213: kvm_buf_set_msrs: Assertion `ret == nmsrs' failed.",
    status=-6,
)
"""A host whose KVM lacks a register that `-cpu host` sets."""


class KvmStandIn:
    def __init__(self, directory: Path, *rules: Rule) -> None:
        self.path = directory / "qemu-stand-in"
        self._log = self.path.with_suffix(".log")
        self._rules = self.path.with_suffix(".rules")
        self._log.touch()
        self.set_rules(*rules)
        self.path.write_text(PROGRAM.replace("BASE", str(self.path)).replace("QEMU", QEMU))
        self.path.chmod(0o755)

    def set_rules(self, *rules: Rule) -> None:
        self._rules.write_text(json.dumps([asdict(rule) for rule in rules]))

    def starts(self) -> list[list[str]]:
        """The arguments of each start so far."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def proofs(self) -> list[list[str]]:
        """Of those, what was booted for a proof."""
        return [arguments for arguments in self.starts() if any("katapod.prove=" in each for each in arguments)]

    def cpus(self) -> list[str]:
        """What the proofs gave as -cpu."""
        return [arguments[arguments.index("-cpu") + 1] for arguments in self.proofs()]


@contextmanager
def kvm_answers() -> Iterator[None]:
    """For this process /dev/kvm answers while the block runs."""
    with mock.patch.object(facts, "_kvm_answers", return_value=True):
        yield
