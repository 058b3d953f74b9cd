"""Verdicts on the accelerators: which one a sandbox gets, and what the proof of each said. Pure."""

from katapod.observe.check_facts import CheckFacts, Line, Outcome, RungFacts, shown_duration

__all__ = ["NO_KVM", "judge_accelerator", "judge_accelerators", "judge_kvm", "judge_uml"]

NO_KVM = "no KVM: guests run by the next accelerator that works"
NEEDED_BY = {"uml": "kata-runtime image build", "kvm": "make /dev/kvm available"}  # accelerators that can be forced
COST_OF_UML = "computes at the host's speed; each system call is dear; what it lacks gets the next accelerator"
COST_OF_TCG = "computes 3 to 18 times slower than the host; starts take more than a second"


def judge_accelerators(facts: CheckFacts) -> tuple[Line, ...]:
    emulation = Line("tcg", "emulation", Outcome.NOTE, "works wherever QEMU does", effect=COST_OF_TCG)
    return judge_accelerator(facts), judge_kvm(facts.kvm), judge_uml(facts.uml), emulation


def judge_accelerator(facts: CheckFacts) -> Line:
    """By proof: what a boot said, not what a device node seems to say."""
    accelerator = facts.accelerator
    title, line_id = "accelerator", "accelerator"
    age = f", found out {shown_duration(accelerator.age_s)} ago" if accelerator.age_s is not None else ""
    evidence = (
        f"accelerator = {accelerator.wanted!r}",
        "/var/cache/kata-containers/accelerator.json",
        *(f"QEMU said: {line}" for line in accelerator.said.splitlines()),
    )
    if accelerator.chosen == "kvm":
        found = f"kvm: {accelerator.reason}{age}"
        return Line(line_id, title, Outcome.OK, found, remedy=accelerator.advice, evidence=evidence)
    if accelerator.chosen == "uml":
        found = f"uml (User-mode Linux): {accelerator.reason}{age}"
        return Line(line_id, title, Outcome.OK, found, remedy=accelerator.advice, evidence=evidence)
    if accelerator.chosen == "tcg":
        remedy = accelerator.advice or "see the lines KVM and User-mode Linux; kata-runtime check --boot tries again"
        if accelerator.wanted == "tcg":
            remedy = 'set accelerator = "auto" in [katapod]'
        return Line(
            line_id,
            title,
            Outcome.LESS,
            f"tcg (software emulation): {accelerator.reason}{age}",
            effect="starts take seconds, and programs run several times slower",
            remedy=remedy,
            evidence=evidence,
        )
    if accelerator.wanted in NEEDED_BY and accelerator.reason:
        usual = f'{NEEDED_BY[accelerator.wanted]}, or set accelerator = "auto" in [katapod]'
        return Line(
            line_id,
            title,
            Outcome.MISSING,
            f"{accelerator.wanted} is forced: {accelerator.reason}",
            effect="no sandbox starts",
            remedy=accelerator.advice or usual,
            evidence=evidence,
        )
    return Line(
        line_id,
        title,
        Outcome.UNKNOWN,
        accelerator.reason or "not found out yet for this boot of the host and this guest image",
        remedy="kata-runtime check --boot, or the first kata-runtime run, finds it out",
        evidence=evidence,
    )


def judge_kvm(kvm: RungFacts) -> Line:
    if kvm.works is None:
        remedy = "kata-runtime check --boot, or the first kata-runtime run, finds it out"
        return Line(
            "kvm.guests", "KVM", Outcome.NOTE, kvm.reason or "not found out yet whether guests boot", remedy=remedy
        )
    outcome = Outcome.OK if kvm.works else Outcome.NOTE
    evidence = tuple(f"QEMU said: {line}" for line in kvm.said.splitlines())
    return Line("kvm.guests", "KVM", outcome, f"{kvm.reason}{_age(kvm)}", remedy=kvm.advice, evidence=evidence)


def judge_uml(uml: RungFacts) -> Line:
    line_id, title = "uml", "User-mode Linux"
    if not uml.installed:
        remedy = "apt-get install user-mode-linux, then kata-runtime image build"
        return Line(line_id, title, Outcome.NOTE, uml.reason, remedy=remedy)
    if uml.works is None:
        remedy = "kata-runtime check --boot, or the first kata-runtime run that gets so far, finds it out"
        return Line(line_id, title, Outcome.NOTE, "not found out yet whether guests boot", remedy=remedy)
    found = f"{uml.reason}{_age(uml)}"
    if not uml.works:
        remedy = uml.advice or "kata-runtime check --boot tries again"
        return Line(line_id, title, Outcome.NOTE, found, remedy=remedy)
    evidence = ("docs/how-to/accelerators.md has what it lacks, and what programs see of it",)
    return Line(line_id, title, Outcome.OK, found, effect=COST_OF_UML, evidence=evidence)


def _age(rung: RungFacts) -> str:
    return f", found out {shown_duration(rung.age_s)} ago" if rung.age_s is not None else ""
