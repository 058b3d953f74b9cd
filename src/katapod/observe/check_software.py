"""Verdicts on what is installed and configured: programs, guest image, engines. Pure."""

import re

from katapod.observe.check_facts import (
    CheckFacts,
    EngineFacts,
    ImageFacts,
    Line,
    Outcome,
    ProgramFacts,
    install,
    shown_duration,
)
from katapod.observe.check_machine import ROOT_ADDS

__all__ = [
    "PROGRAMS",
    "judge_boot",
    "judge_configuration",
    "judge_engine",
    "judge_image",
    "judge_program",
    "judge_qemu",
    "judge_shim",
    "judge_software",
]

QEMU_TRIED = (7, 2)
"""Katapod is tried with this version and later ones."""

PROGRAMS = {  # name: whether no sandbox starts without it, what is lost, package of Debian, of Fedora and RHEL
    "virtiofsd": (True, "no sandbox starts", "virtiofsd, or on Debian 12 qemu-system-common", "virtiofsd"),
    "ip": (False, "sandboxes get no network", "iproute2", "iproute"),
    "tc": (False, "pods get no network", "iproute2", "iproute-tc"),
    "iptables": (False, "the built-in network cannot be made", "iptables", "iptables-nft"),
    "mke2fs": (False, "images cannot be disks of the VM", "e2fsprogs", "e2fsprogs"),
    "skopeo": (False, "images can be neither pulled nor imported", "skopeo", "skopeo"),
    "umoci": (False, "images cannot be unpacked", "umoci", "umoci"),
    "crun": (False, "the guest image cannot be built", "crun", "crun"),
    "busybox": (False, "the guest image cannot be built", "busybox-static", "busybox"),
    "dracut": (False, "the guest image cannot be built", "dracut-core", "dracut"),
    "depmod": (False, "the guest image cannot be built", "kmod", "kmod"),
    "cpio": (False, "the guest image cannot be built", "cpio", "cpio"),
}

SNIPPETS = {
    "containerd": "add the tables of packaging/containerd/kata.toml to /etc/containerd/config.toml and restart it",
    "crio": "copy packaging/crio/50-kata to /etc/crio/crio.conf.d/50-kata and restart CRI-O",
}


def judge_software(facts: CheckFacts) -> tuple[Line, ...]:
    qemu, *others = facts.programs
    return (
        judge_configuration(facts),
        judge_qemu(qemu),
        *(judge_program(program) for program in others),
        *judge_image(facts.image),
        judge_boot(facts),
        judge_shim(facts.shim, engines=any(engine.program.found for engine in facts.engines)),
        *(judge_engine(engine) for engine in facts.engines),
    )


def judge_configuration(facts: CheckFacts) -> Line:
    if facts.configuration_error:
        remedy = "correct it: docs/how-to/configuration.md has every key"
        return Line(
            "configuration", "configuration", Outcome.MISSING, facts.configuration_error, "nothing starts", remedy
        )
    return Line("configuration", "configuration", Outcome.OK, facts.configuration)


def judge_qemu(program: ProgramFacts) -> Line:
    line_id, title = "program.qemu", "QEMU"
    package = install("qemu-system-x86", "qemu-kvm")
    if not program.found:
        found = f"{program.path} is not a program"
        remedy = f"{package}, or correct path in [hypervisor.qemu]"
        return Line(line_id, title, Outcome.MISSING, found, "no sandbox starts", remedy)
    match = re.search(r"version (\d+)\.(\d+)", program.version)
    if match is None:
        found = f"{program.path} does not say its version: {program.version or 'no output'}"
        return Line(line_id, title, Outcome.MISSING, found, "no sandbox starts", package)
    version = re.search(r"version (\S+)", program.version)
    found = f"{version[1] if version else ''} ({program.path})"
    if (int(match[1]), int(match[2])) < QEMU_TRIED:
        effect = f"not tried with versions before {QEMU_TRIED[0]}.{QEMU_TRIED[1]}"
        return Line(line_id, title, Outcome.LESS, found, effect, "use a newer QEMU", (program.version,))
    return Line(line_id, title, Outcome.OK, found, evidence=(program.version,))


def judge_program(program: ProgramFacts) -> Line:
    needed, effect, deb, rpm = PROGRAMS[program.name]
    line_id = f"program.{program.name}"
    if program.found:
        found = f"{program.version} ({program.path})" if program.version else program.path
        return Line(line_id, program.name, Outcome.OK, found)
    outcome = Outcome.MISSING if needed else Outcome.LESS
    found = f"not in {program.path}" if program.path else "not installed"
    return Line(line_id, program.name, outcome, found, effect, install(deb, rpm))


def judge_image(image: ImageFacts) -> tuple[Line, ...]:
    lines = []
    build = "kata-runtime image build"
    for key, path, error in (
        ("kernel", image.kernel, image.kernel_error),
        ("initrd", image.initrd, image.initrd_error),
    ):
        line_id, title = f"image.{key}", f"guest {key}"
        if error:
            lines.append(Line(line_id, title, Outcome.MISSING, f"{path}: {error}", "no sandbox starts", build))
        else:
            lines.append(Line(line_id, title, Outcome.OK, path))
    line_id, title = "image", "guest image"
    if image.kernel_error or image.initrd_error:
        return tuple(lines)
    if not image.built_in_place:
        lines.append(
            Line(line_id, title, Outcome.NOTE, "the configuration names files of its own: their origin is unknown")
        )
    elif not image.complete:
        effect, found = "sandboxes may not start", "manifest, sizes and links do not agree"
        lines.append(Line(line_id, title, Outcome.MISSING, found, effect, build))
    else:
        found = f"built {shown_duration(image.age_s)} ago for kernel {image.kernel_version}, {image.size_mib:.1f} MiB"
        if image.newest_kernel and image.newest_kernel != image.kernel_version:
            effect = f"guests do not run the newest kernel that is installed: {image.newest_kernel}"
            lines.append(Line(line_id, title, Outcome.LESS, found, effect, build, image.notes))
        else:
            lines.append(Line(line_id, title, Outcome.OK, found, evidence=image.notes))
    return tuple(lines)


def judge_boot(facts: CheckFacts) -> Line:
    boot, line_id, title = facts.accelerator.boot, "image.boots", "guest boots"
    if boot.works:
        found = f"in {facts.accelerator.boot_s:.1f} s under {facts.accelerator.chosen}, until its agent answers"
        return Line(line_id, title, Outcome.OK, found, evidence=("booted just now, with nothing but a console",))
    if boot.works is False:
        remedy = "read the console's tail above; kata-runtime image build"
        return Line(line_id, title, Outcome.MISSING, boot.said, "no sandbox starts", remedy)
    image = facts.image
    if image.complete and image.built_in_place and not image.kernel_error and not image.initrd_error:
        found = f"it did when it was built, {shown_duration(image.age_s)} ago; --boot tries again"
        return Line(line_id, title, Outcome.OK, found, evidence=("an image is used only after it has booted once",))
    return Line(line_id, title, Outcome.UNKNOWN, boot.said, remedy="kata-runtime check --boot")


def judge_shim(path: str, *, engines: bool) -> Line:
    line_id, title = "shim", "shim"
    if path:
        return Line(line_id, title, Outcome.OK, path)
    found = "containerd-shim-kata-v2 is in no directory where engines look"
    if not engines:
        return Line(line_id, title, Outcome.NOTE, f"{found}; there is no engine either")
    remedy = "make install PREFIX=/usr"
    return Line(line_id, title, Outcome.LESS, found, "no pod starts", remedy, ("looked for in PATH and /usr/local",))


def judge_engine(engine: EngineFacts) -> Line:
    line_id = f"engine.{engine.name}"
    evidence = tuple(f"read {name}" for name in engine.files)
    if not engine.program.found:
        return Line(line_id, engine.name, Outcome.NOTE, "not installed", evidence=evidence)
    version = engine.program.version or engine.program.path
    if engine.problem:
        readable = "ermission" not in engine.problem
        outcome = Outcome.LESS if readable else Outcome.UNKNOWN
        remedy = "correct the file" if readable else ROOT_ADDS
        return Line(line_id, engine.name, outcome, f"{version}; {engine.problem}", "", remedy, evidence)
    if not engine.handlers:
        found = f"{version}, without a handler for the shim"
        return Line(
            line_id, engine.name, Outcome.LESS, found, "its pods are not in VMs", SNIPPETS[engine.name], evidence
        )
    return Line(line_id, engine.name, Outcome.OK, f"{version}, handler {', '.join(engine.handlers)}", evidence=evidence)
