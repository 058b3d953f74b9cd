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

from msgspec.structs import replace

from katapod.host import facts
from katapod.plan.jail import Access, Bind, JailPlan
from katapod.sandbox import proof
from katapod.vmm.qemu import jail, process
from katapod.vmm.qemu.command_line import QemuPlan
from katapod.vmm.qemu.jail import HostFiles

__all__ = ["ARCH_CAPABILITIES", "KvmStandIn", "Rule", "kvm_answers"]

QEMU = "/usr/bin/qemu-system-x86_64"
NAME = "qemu-stand-in"

PROGRAM = r"""#!/usr/bin/python3 -IS
import fcntl, json, os, re, sys

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
            os.abort()
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
        argument = "tcg,thread=single"
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
    status: int = 1  # negative: it aborts
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
        self.path = directory / NAME
        self._log = self.path.with_suffix(".log")
        self._rules = self.path.with_suffix(".rules")
        self._log.touch()
        self.set_rules(*rules)
        for path in (self._log, self._rules):
            path.chmod(0o666)
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
    """For this process /dev/kvm answers while the block runs, and a stand-in finds in its jail what it needs more than
    a QEMU: its interpreter, the real QEMU and its own two files."""

    def look_at_host(plan: QemuPlan, program: Path) -> HostFiles:
        return jail.look_at_host(_without_kvm(plan), program)

    def plan_jail(plan: QemuPlan, host: HostFiles, netns: Path | None) -> JailPlan:
        planned = jail.plan_jail(_without_kvm(plan), host, netns)
        if not host.program.name.startswith(NAME):
            return planned
        more = [Bind(Path(each).resolve(), each, Access.EXECUTE) for each in ("/usr/bin/python3", QEMU)]
        own = (host.program.with_suffix(suffix) for suffix in (".log", ".rules"))
        more += [Bind(each, str(each), Access.WRITE) for each in own]
        return replace(planned, binds=(*planned.binds, *more))

    with (
        mock.patch.object(facts, "_kvm_answers", return_value=True),
        mock.patch.object(proof, "instructions_a_second", return_value=None),
        mock.patch.object(process, "look_at_host", look_at_host),
        mock.patch.object(process, "plan_jail", plan_jail),
    ):
        yield


def _without_kvm(plan: QemuPlan) -> QemuPlan:
    return replace(plan, files=tuple(file for file in plan.files if file != jail.KVM))
