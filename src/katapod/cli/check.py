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
    from katapod.observe.check_facts import AcceleratorFacts, ImageFacts, RungFacts
    from katapod.vmm.proof import AcceleratorChoice
    from katapod.vmm.spec import Accelerator

__all__ = ["check"]

NO_RELEASES = "Katapod has no list of releases; your package manager does"


def _refuse(context: click.Context, parameter: click.Parameter, given: bool) -> None:
    if given and not context.resilient_parsing:
        raise UsageError(
            f"cannot use {parameter.opts[0]}: {NO_RELEASES}",
            hint="kata-runtime version prints the installed one",
        )


def _refused(name: str) -> Callable[[F], F]:
    """A flag of upstream's that asks for its releases."""
    return flag(name, help="Refused.", hidden=True, expose_value=False, callback=_refuse)


@verb("check")
@flag("--boot", help="Also boot the guest image, and try KVM and User-mode Linux again. Takes seconds; needs root.")
@flag("-s", "--strict", help="Also fail if something works with less or was not checked.")
@flag("--json", "as_json", help="Print JSON.")
@flag("-v", "--verbose", help="Show how each result was obtained.")
@flag("-n", "--no-network-checks", help="Accepted for compatibility; the network is never used.", expose_value=False)
@_refused("--check-version-only")
@_refused("--only-list-releases")
@_refused("--include-all-releases")
@click.pass_obj
def check(settings: Globals, boot: bool, strict: bool, as_json: bool, verbose: bool) -> int:
    """Check whether this machine can run sandboxes. Each line is ok, works with less, or missing, with what to do.

    Changes nothing. Without root some checks are skipped, and their lines say so. The exit status is 0 if sandboxes can
    run, and 1 if they cannot or, with --strict, if anything works with less.
    """
    if boot:
        need_root("check --boot")
    return interruptible(_check(settings, boot=boot, strict=strict, as_json=as_json, verbose=verbose))


async def _check(settings: Globals, *, boot: bool, strict: bool, as_json: bool, verbose: bool) -> int:
    from msgspec.structs import replace

    from katapod.host.facts import collect_host_facts
    from katapod.model.config import Config, load_config
    from katapod.observe.check import judge
    from katapod.observe.check_host import collect_check_facts
    from katapod.vmm.spec import Accelerator

    configuration, error, config = "", "", Config()
    try:
        parsed = load_config(Path(settings.config_file) if settings.config_file else None)
        config, configuration = parsed.config, parsed.source
    except KatapodError as exc:
        error = str(exc)
    host, image = collect_host_facts(), _image(settings, config)
    if os.geteuid() != 0 and os.path.exists("/dev/kvm"):
        host = replace(host, kvm=True)  # what is found is what root is given, whether or not we may open it
    began = time.monotonic()
    accelerator = await _accelerator(settings, config, host, boot=boot)
    since = began if boot else None
    kvm = await _rung(settings, config, host, Accelerator.KVM, since)
    rungs = (kvm, await _rung(settings, config, host, Accelerator.UML, since))
    facts = await collect_check_facts(
        config,
        host,
        settings.layout,
        image,
        (accelerator, *rungs),
        configuration=configuration,
        configuration_error=error,
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
    """The choice that is kept, with its age; with `boot` a new one, and the image booted under it."""
    from msgspec.structs import replace

    from katapod.observe.check_facts import AcceleratorFacts, Trial
    from katapod.sandbox.ladder import needs_of_config
    from katapod.sandbox.planning import proof_for
    from katapod.sandbox.proof import (
        FIRST_LIMIT_S,
        NO_KVM,
        TCG_LIMIT_S,
        choose_accelerator,
        kept_choice,
        likely_choice,
        prove_machine,
        wanted_accelerator,
    )
    from katapod.vmm.spec import Accelerator

    facts = AcceleratorFacts(wanted_accelerator(config))
    proof_file, needs = settings.layout.proof_file, needs_of_config(config)
    try:
        if not boot and facts.wanted == "auto":
            likely = likely_choice(config, host, proof_file, needs)
            return _with(facts, likely) if likely is not None else facts
        if not boot and facts.wanted != "tcg":
            rung = Accelerator(facts.wanted)
            kept = kept_choice(config, host, proof_file, rung)
            if kept is None and rung is Accelerator.KVM and not host.kvm:
                return replace(facts, reason=NO_KVM)
            if kept is None:
                return facts
            # a start tries what is forced again, whatever was found for auto
            return replace(_with(facts, kept), chosen=facts.wanted if kept.accelerator is rung else "")
        with tempfile.TemporaryDirectory(prefix="katapod-proof-") as scratch:
            choice = await choose_accelerator(
                facts.wanted, config, host, proof_file, Path(scratch), again=boot, needs=needs
            )
            facts = _with(facts, choice)
            if not boot:
                return facts
            limit_s = FIRST_LIMIT_S if choice.accelerator is not Accelerator.TCG else TCG_LIMIT_S
            plan = proof_for(config, host, choice.accelerator)
            began = time.monotonic()
            await prove_machine(
                plan.with_remedy(choice.remedy), limit_s=limit_s, scratch_parent=Path(scratch), vmm=plan.vmm
            )
            return replace(facts, boot=Trial(True), boot_s=time.monotonic() - began)
    except (KatapodError, OSError) as exc:
        if facts.chosen:
            return replace(facts, boot=Trial(False, str(exc)))
        return replace(facts, reason=str(exc), advice=exc.hint if isinstance(exc, KatapodError) else "")


async def _rung(
    settings: Globals, config: "Config", host: "HostFacts", rung: "Accelerator", began: float | None
) -> "RungFacts":
    """The proof of an accelerator that is kept, with its age. With `began`, of time.monotonic(), one made since then,
    now if need be."""
    from katapod.observe.check_facts import RungFacts
    from katapod.sandbox.proof import NO_KVM, choose_accelerator, kept_choice

    proof_file = settings.layout.proof_file
    try:
        kept = kept_choice(config, host, proof_file, rung)
    except KatapodError as exc:  # NoGuestImage
        return RungFacts(installed=False, reason=str(exc))
    except OSError as exc:
        return RungFacts(reason=f"{exc.filename}: {exc.strerror}")
    if began is not None and (kept is None or kept.age_s is None or kept.age_s > time.monotonic() - began):
        with tempfile.TemporaryDirectory(prefix="katapod-proof-") as scratch:
            try:
                kept = await choose_accelerator(rung.value, config, host, proof_file, Path(scratch), again=True)
            except (KatapodError, OSError) as exc:
                reason = str(exc).partition("\n")[0]
                return RungFacts(works=False, reason=reason, advice=getattr(exc, "hint", ""))
    if kept is None and not host.kvm and rung.value == "kvm":
        return RungFacts(works=False, reason=NO_KVM)
    if kept is None:
        return RungFacts()
    return RungFacts(
        works=kept.accelerator is rung, reason=kept.reason, age_s=kept.age_s, advice=kept.advice, said=kept.said
    )


def _with(facts: "AcceleratorFacts", choice: "AcceleratorChoice") -> "AcceleratorFacts":
    from msgspec.structs import replace

    return replace(
        facts,
        chosen=choice.accelerator.value,
        reason=choice.reason,
        advice=choice.advice,
        said=choice.said,
        age_s=choice.age_s,
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
    print(f"\n{', '.join(counts)}, {report.count(Outcome.UNKNOWN)} not checked")
    if not report.capable:
        sys.stdout.flush()
        print(f"ERROR: {NOT_CAPABLE}", file=sys.stderr)
        return
    print(CAPABLE)
    if report.root:
        print(CREATES)
    if not report.passes(strict=strict):
        sys.stdout.flush()
        print("ERROR: --strict: something works with less or was not checked", file=sys.stderr)
