"""What users see of the proof of KVM, on a host that a stand-in for QEMU makes: it takes KVM's command line, fails as
hosts do, or emulates."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faults import write_config

from katapod.host.facts import HostFacts, collect_host_facts
from katapod.model.config import Config, load_config
from katapod.sandbox.planning import proof_for
from katapod.sandbox.proof import kept_choice
from katapod.sandbox.proof_file import ProofFile
from katapod.vmm.proof import AcceleratorChoice
from katapod.vmm.spec import Accelerator
from kit.kata import Kata
from kit.kvm_stand_in import ARCH_CAPABILITIES, KvmStandIn, Rule, kvm_answers
from kit.template_dirs import TemplateDir

TESTS = Path(__file__).parents[1]
PROOFS = Path("/var/cache/kata-containers/accelerator.json")
MSR = "failed to set MSR 0x10a to 0x69"


class Host:
    """`kata-runtime` where /dev/kvm answers and QEMU is the stand-in."""

    def __init__(self, directory: Path, kata: Kata, **tables: Any) -> None:
        self.qemu = KvmStandIn(directory)
        self.kata = kata
        qemu = {"path": str(self.qemu.path), **tables.pop("qemu", {})}
        tables = {"factory": {"enable_template": False}, **tables}
        self.config = write_config(directory, qemu=qemu, katapod={"accelerator": "auto"}, **tables)

    def begin(self, *args: str, limit_s: float = 240) -> "subprocess.Popen[str]":
        environment = {**os.environ, "PYTHONPATH": str(TESTS), "KVM_HOST_LIMIT_S": str(limit_s)}
        environment.pop("KATAPOD_ACCELERATOR", None)
        return subprocess.Popen(
            [sys.executable, "-m", "kit.kvm_host", "--config", str(self.config), *args],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def begin_run(self, *args: str, limit_s: float = 240) -> "subprocess.Popen[str]":
        return self.begin("run", "--rm", "--name", self.kata.name(), *args, limit_s=limit_s)

    def run(self, *args: str, limit_s: float = 240) -> tuple[int, str, str]:
        process = self.begin_run(*args, limit_s=limit_s)
        out, err = process.communicate(timeout=180)
        return process.returncode, out, err

    def checked(self, line_id: str = "accelerator") -> dict[str, Any]:
        """A line of `check --json`."""
        out, _ = self.begin("check", "--json").communicate(timeout=180)
        return next(line for line in json.loads(out)["lines"] if line["line_id"] == line_id)

    def question(self) -> tuple[Config, HostFacts]:
        with kvm_answers():
            return load_config(self.config).config, collect_host_facts()

    def kept(self) -> AcceleratorChoice | None:
        """The choice that the next start would use."""
        return kept_choice(*self.question(), PROOFS)

    def keep_that_kvm_works(self) -> None:
        config, facts = self.question()
        worked = AcceleratorChoice(Accelerator.KVM, "it booted", fresh=True)
        ProofFile(PROOFS, facts.boot_id).keep(proof_for(config, facts), worked, None)

    def sandboxes(self) -> list[str]:
        """-accel and -cpu of all VMs that were no proof."""
        proofs = self.qemu.proofs()
        return [
            f"{each[each.index('-accel') + 1].partition(',')[0]} {each[each.index('-cpu') + 1]}"
            for each in self.qemu.starts()
            if each not in proofs
        ]


def test_six_first_starts_at_once(tmp_path: Path, kata: Kata, templates_here: TemplateDir) -> None:
    """As on a node that restarts its pods."""
    host = Host(tmp_path, kata, factory={"enable_template": True, "template_path": str(templates_here.root)})
    started = [host.begin_run("busybox", "echo", str(number)) for number in range(6)]
    ended = [process.communicate(timeout=180) for process in started]
    assert [out for out, _ in ended] == [f"{number}\n" for number in range(6)], ended
    assert len(host.qemu.proofs()) == 1
    assert set(host.sandboxes()) == {"kvm host,pmu=off"}
    told = [err for _, err in ended if err]
    assert told == ["kata-runtime: using kvm: the guest image boots under KVM\n"]
    kept = host.kept()
    assert kept is not None
    assert (kept.accelerator, kept.reason) == (Accelerator.KVM, "the guest image boots under KVM")


def test_a_host_that_needs_a_remedy(tmp_path: Path, kata: Kata) -> None:
    host = Host(tmp_path, kata)
    host.qemu.set_rules(ARCH_CAPABILITIES)
    code, out, err = host.run("busybox", "echo", "ran")
    assert (code, out) == (0, "ran\n"), err
    assert err == (
        "kata-runtime: using kvm: the guest image boots under KVM with arch-capabilities=off "
        f"(without: QEMU said: error: {MSR}) "
        '(to set it for good: cpu_features = "pmu=off,arch-capabilities=off" in [hypervisor.qemu])\n'
    )
    assert host.qemu.cpus() == ["host,pmu=off", "host,pmu=off,arch-capabilities=off"]
    assert host.sandboxes() == ["kvm host,pmu=off,arch-capabilities=off"]
    line = host.checked()
    assert line["outcome"] == "ok"
    assert MSR in line["found"]
    assert "arch-capabilities=off" in line["remedy"]

    # KVM fails later on the same boot: what was found out is no longer trusted, and a shortage is not held against it
    host.qemu.set_rules(Rule(say="error: kvm run failed Bad address"))
    code, _, err = host.run("busybox", "true")
    assert code == 125
    assert "kvm run failed Bad address" in err
    assert host.kept() is None
    host.qemu.set_rules(Rule(say="cannot set up guest memory 'dimm1': Cannot allocate memory", times=1))
    code, out, err = host.run("busybox", "echo", "emulated")
    assert (code, out) == (0, "emulated\n"), err
    assert "using tcg: KVM could not be tried: QEMU said: cannot set up guest memory 'dimm1'" in err
    assert host.kept() is None


def test_a_host_on_which_kvm_does_not_work(tmp_path: Path, kata: Kata) -> None:
    host = Host(tmp_path, kata)
    host.qemu.set_rules(Rule(say=f"error: {MSR}", status=-6))
    code, out, err = host.run("busybox", "echo", "emulated")
    assert (code, out) == (0, "emulated\n"), err
    reason = f"/dev/kvm opens, but the guest image does not boot under it: QEMU said: error: {MSR}"
    assert err.startswith(f"kata-runtime: using tcg: {reason}; with arch-capabilities=off: ")
    assert "ignore_msrs" in err
    line = host.checked()
    assert (line["outcome"], reason in line["found"]) == ("less", True)
    line = host.checked("kvm.guests")
    assert "ignore_msrs" in line["remedy"]
    assert f"QEMU said: qemu-system-x86_64: error: {MSR}" in line["evidence"]
    assert MSR in PROOFS.read_text()

    # a setting of the machine's is another question, and so is a host that was mended
    host.qemu.set_rules()
    changed = Path(host.config).read_text().replace("[hypervisor.qemu]", '[hypervisor.qemu]\ncpu_features = "vmx=off"')
    host.config.write_text(changed)
    code, _, err = host.run("busybox", "true")
    assert (code, err) == (0, "kata-runtime: using kvm: the guest image boots under KVM\n")
    assert host.qemu.cpus()[-1] == "host,vmx=off"


@pytest.mark.parametrize("proven", [False, True])
def test_forced_kvm_that_hangs_reaches_one_limit(
    tmp_path: Path, kata: Kata, templates_here: TemplateDir, proven: bool
) -> None:
    factory = {"enable_template": True, "template_path": str(templates_here.root)}
    host = Host(tmp_path, kata, factory=factory, agent={"dial_timeout": 4})
    if proven:  # then it is the template that hangs
        host.keep_that_kvm_works()
    host.qemu.set_rules(Rule(hang=True))
    code, _, err = host.run("--accel", "kvm", "busybox", "true")
    assert code == 125
    assert len(host.qemu.starts()) == 1, "no second VM that reaches a limit of its own"
    assert err.count("within 4 s") == 1, err
    assert "--accel tcg" in err
    kept = host.kept()
    assert kept is None if proven else kept is not None and "within 4 s" in kept.reason
