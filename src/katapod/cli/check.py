"""`kata-runtime check` (alias kata-check): whether this machine can run sandboxes, and what to do where it cannot."""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from katapod.cli.command import F, flag, verb
from katapod.cli.interrupt import interruptible
from katapod.cli.settings import Globals, need_root
from katapod.model.errors import KatapodError, UsageError
from katapod.model.plain import plain

if TYPE_CHECKING:
    from katapod.host.facts import HostFacts
    from katapod.model.config import Config
    from katapod.observe.check import Report
    from katapod.observe.check_facts import AcceleratorFacts, ImageFacts
    from katapod.vmm.proof import Verdict

__all__ = ["check"]

NO_RELEASES = "Katapod has no list of releases to ask: your package manager knows them"


def _refuse(context: click.Context, parameter: click.Parameter, given: bool) -> None:
    if given and not context.resilient_parsing:
        raise UsageError(
            f"cannot use {parameter.opts[0]}: {NO_RELEASES}",
            hint="kata-runtime version prints the one that is installed",
        )


def _refused(name: str) -> Callable[[F], F]:
    """A flag of upstream's that asks for its releases."""
    return flag(name, help="Refused.", hidden=True, expose_value=False, callback=_refuse)


@verb("check")
@flag("--boot", help="Also boot the guest image, and try KVM again. Takes seconds; needs root.")
@flag("-s", "--strict", help="Fail too where something works with less, or was not looked at.")
@flag("--json", "as_json", help="Print JSON for programs.")
@flag("-v", "--verbose", help="Say how each thing was found out.")
@flag("-n", "--no-network-checks", help="Accepted: the network is never asked.", expose_value=False)
@_refused("--check-version-only")
@_refused("--only-list-releases")
@_refused("--include-all-releases")
@click.pass_obj
def check(settings: Globals, boot: bool, strict: bool, as_json: bool, verbose: bool) -> int:
    """Check whether this machine can run sandboxes. Each line is ok, works with less, or missing, with what to do.

    Changes nothing. Without root less is looked at, and the lines say so. Exit status 0: sandboxes can run; 1: not, or
    with --strict not with everything.
    """
    if boot:
        need_root("check --boot")
    return interruptible(_check(settings, boot=boot, strict=strict, as_json=as_json, verbose=verbose))


async def _check(settings: Globals, *, boot: bool, strict: bool, as_json: bool, verbose: bool) -> int:
    from katapod.host.facts import collect_host_facts
    from katapod.model.config import Config, load_config
    from katapod.observe.check import judge
    from katapod.observe.check_host import collect_check_facts

    configuration, error, config = "", "", Config()
    try:
        parsed = load_config(Path(settings.config_file) if settings.config_file else None)
        config, configuration = parsed.config, parsed.source
    except KatapodError as exc:
        error = str(exc)
    host, image = collect_host_facts(), _image(settings, config)
    accelerator = await _accelerator(settings, config, host, boot=boot)
    facts = await collect_check_facts(
        config, host, settings.layout, image, accelerator, configuration=configuration, configuration_error=error
    )
    report = judge(facts)
    passed = report.passes(strict=strict)
    if as_json:
        _print_json(report, strict=strict)
    else:
        _print_for_people(report, strict=strict, verbose=verbose)
    return 0 if passed else 1


def _image(settings: Globals, config: "Config") -> "ImageFacts":
    from katapod.model.flavour import initrd_link, kernel_link
    from katapod.observe.check_facts import ImageFacts
    from katapod.observe.check_host import file_problem
    from katapod.osbuilder import OsbuilderError, current_image, find_kernel

    cache = settings.layout.guest_image_root
    flavour = config.katapod.guest_flavour
    links = (str(cache / kernel_link(flavour)), str(cache / initrd_link(flavour)))
    built_in_place = (config.qemu.kernel, config.qemu.initrd) == links
    image = current_image(cache, flavour)
    try:
        newest = find_kernel().version
    except (OsbuilderError, OSError):
        newest = ""
    return ImageFacts(
        kernel=config.qemu.kernel,
        initrd=config.qemu.initrd,
        kernel_error=file_problem(config.qemu.kernel),
        initrd_error=file_problem(config.qemu.initrd),
        built_in_place=built_in_place,
        complete=image is not None,
        kernel_version=image.kernel_version if image else "",
        newest_kernel=newest,
        size_mib=image.size / (1 << 20) if image else 0.0,
        age_s=time.time() - image.initrd.stat().st_mtime if image else 0.0,
        notes=image.notes if image else (),
    )


async def _accelerator(settings: Globals, config: "Config", host: "HostFacts", *, boot: bool) -> "AcceleratorFacts":
    """The verdict that is kept, with its age; with `boot` a new one, and the image booted under it."""
    from dataclasses import replace

    from katapod.observe.check_facts import AcceleratorFacts, Trial
    from katapod.sandbox.planning import proof_for
    from katapod.sandbox.proof import (
        KVM_LIMIT_S,
        TCG_LIMIT_S,
        choose_accelerator,
        kept_verdict,
        prove_machine,
        wanted_accelerator,
    )
    from katapod.vmm.spec import Accelerator

    facts = AcceleratorFacts(wanted_accelerator(config))
    proof_file = settings.layout.proof_file
    if os.geteuid() != 0 and os.path.exists("/dev/kvm"):
        host = replace(host, kvm=True)  # the verdict is the one that root is given, whether or not we may open it
    try:
        if not boot and facts.wanted != "tcg":
            return _kept(facts, kept_verdict(config, host, proof_file), kvm=host.kvm)
        with tempfile.TemporaryDirectory(prefix="katapod-proof-") as scratch:
            verdict = await choose_accelerator(facts.wanted, config, host, proof_file, Path(scratch), again=boot)
            facts = _with(facts, verdict)
            if not boot:
                return facts
            limit_s = KVM_LIMIT_S if verdict.accelerator is Accelerator.KVM else TCG_LIMIT_S
            vm = replace(proof_for(config, host).vm, accelerator=verdict.accelerator, remedy=verdict.remedy)
            began = time.monotonic()
            await prove_machine(vm, limit_s=limit_s, scratch_parent=Path(scratch))
            return replace(facts, boot=Trial(True), boot_s=time.monotonic() - began)
    except (KatapodError, OSError) as exc:
        if facts.chosen:
            return replace(facts, boot=Trial(False, str(exc)))
        return replace(facts, reason=str(exc), advice=exc.hint if isinstance(exc, KatapodError) else "")


def _kept(facts: "AcceleratorFacts", kept: "Verdict | None", *, kvm: bool) -> "AcceleratorFacts":
    """What a start would use, as far as that is known without a boot."""
    from dataclasses import replace

    forced = facts.wanted == "kvm"
    if kept is None and not kvm:
        reason = "this host has no /dev/kvm"
        return replace(facts, reason=reason) if forced else replace(facts, chosen="tcg", reason=reason)
    if kept is None:
        return facts
    facts = _with(facts, kept)
    # a start tries a forced KVM again, whatever was found for auto
    return replace(facts, chosen="") if forced and facts.chosen != "kvm" else facts


def _with(facts: "AcceleratorFacts", verdict: "Verdict") -> "AcceleratorFacts":
    from dataclasses import replace

    return replace(
        facts,
        chosen=verdict.accelerator.value,
        reason=verdict.reason,
        advice=verdict.advice,
        said=verdict.said,
        age_s=verdict.age_s,
    )


def _print_json(report: "Report", *, strict: bool) -> None:
    import msgspec

    from katapod.observe.check_facts import Outcome

    document = {
        "format": 1,
        "capable": report.capable,
        "passed": report.passes(strict=strict),
        "strict": strict,
        "root": report.root,
        "counts": {outcome.value: report.count(outcome) for outcome in Outcome},
        "lines": report.lines,
    }
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n")


def _print_for_people(report: "Report", *, strict: bool, verbose: bool) -> None:
    from katapod.observe.check import CAPABLE, CREATES, NOT_CAPABLE
    from katapod.observe.check_facts import Outcome

    shown = {
        Outcome.OK: "ok",
        Outcome.LESS: "less",
        Outcome.MISSING: "MISSING",
        Outcome.UNKNOWN: "?",
        Outcome.NOTE: "-",
    }
    width = max(len(line.title) for line in report.lines)
    for line in report.lines:
        print(f"{shown[line.outcome]:7}  {line.title:{width}}  {plain(line.found)}")
        more = [("effect", line.effect), ("do", line.remedy)]
        more += [("seen", text) for text in line.evidence] if verbose else []
        for name, text in more:
            if text:
                print(f"{'':7}  {'':{width}}  {name}: {plain(text)}")
    counts = (f"{report.count(Outcome.MISSING)} missing", f"{report.count(Outcome.LESS)} work with less")
    print(f"\n{', '.join(counts)}, {report.count(Outcome.UNKNOWN)} not looked at")
    if not report.capable:
        sys.stdout.flush()
        print(f"ERROR: {NOT_CAPABLE}", file=sys.stderr)
        return
    print(CAPABLE)
    if report.root:
        print(CREATES)
    if not report.passes(strict=strict):
        sys.stdout.flush()
        print("ERROR: --strict: something works with less, or was not looked at", file=sys.stderr)
