"""Accelerator by proof: KVM is used only where this very guest image has been seen to boot under it.

/dev/kvm that opens proves nothing: there are hosts where guest kernels hang under it. The verdict is kept,
keyed by kernel, initrd, QEMU and this boot of the host.
"""

import asyncio
import contextlib
import logging
import secrets
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import msgspec

from katapod.host.facts import HostFacts, file_identity
from katapod.host.logs import read_tail
from katapod.host.qemu import QemuFailed, QemuLogs, running_qemu
from katapod.host.state import write_atomically
from katapod.model.config import Config
from katapod.model.errors import DeviceMissing, KatapodError
from katapod.model.layout import Layout
from katapod.plan.vmm import Accelerator, VmSpec, plan_qemu

__all__ = ["BootNotProven", "Verdict", "accelerator_for", "choose_accelerator", "kept_verdict", "prove_boot"]

log = logging.getLogger(__name__)

KVM_LIMIT_S = 10.0
TCG_LIMIT_S = 90.0
PROOF_MEM_MIB = 512


class BootNotProven(KatapodError):
    """A guest image did not boot to a working agent."""


@dataclass(frozen=True, slots=True)
class Verdict:
    accelerator: Accelerator
    reason: str
    fresh: bool  # found out just now: worth a word to the user


class _Proofs(msgspec.Struct, forbid_unknown_fields=True):
    """The file of verdicts: key to (accelerator, reason). Only those of this boot are kept."""

    boot_id: str
    verdicts: dict[str, tuple[Accelerator, str]]


async def prove_boot(
    kernel: Path,
    initrd: Path,
    qemu: str,
    accelerator: Accelerator,
    *,
    limit_s: float,
    scratch_parent: Path | None = None,
) -> None:
    """Boot the image once, with nothing but a console, until its agent says that all it needs works.

    Its files lie in a new directory below `scratch_parent`, else in the system's temporary directory.
    Raises BootNotProven with the tail of the guest's console, QemuFailed if QEMU does not start.
    """
    token = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(
        prefix="proof-" if scratch_parent else "katapod-proof-", dir=scratch_parent
    ) as scratch:
        directory = Path(scratch)
        spec = VmSpec(
            sandbox_id=f"proof-{token}",
            uuid=str(uuid.uuid4()),
            qemu=qemu,
            kernel=kernel,
            initrd=initrd,
            accelerator=accelerator,
            boot_mem_mib=PROOF_MEM_MIB,
            max_mem_mib=PROOF_MEM_MIB,
            memory_slots=0,
            vcpus=1,
            max_vcpus=1,
            vm_dir=directory,
            kernel_params=(f"katapod.prove={token}",),
        )
        logs = QemuLogs(directory / "console.log", directory / "vmm.log")
        async with running_qemu(plan_qemu(spec), logs) as vm:
            await vm.resume()
            ended = True
            try:
                async with asyncio.timeout(limit_s):
                    await vm.wait_end()
            except TimeoutError:
                ended = False
            await asyncio.sleep(0.05)  # the console's last bytes
        console = read_tail(logs.console, max_bytes=16384, max_lines=25)
    if f"katapod-agent: proven {token}" in console:
        return
    how = "ended without the agent's word" if ended else f"did not finish booting within {limit_s:g} s"
    raise BootNotProven(
        f"cannot boot {initrd} with kernel {kernel} under {accelerator.value}: the guest {how}"
        + (f"\nlast lines of its console:\n{console}" if console else "; its console is silent")
    )


async def choose_accelerator(
    wanted: str,
    facts: HostFacts,
    kernel: Path,
    initrd: Path,
    qemu: str,
    proof_file: Path,
    scratch_parent: Path,
    *,
    again: bool = False,
) -> Verdict:
    """Return the accelerator for `wanted` (auto, kvm, tcg). Raises DeviceMissing for kvm without /dev/kvm.

    With `again` a verdict that was kept does not count. `scratch_parent` is the caller's to remove: nothing of a proof
    stays even when we are killed.
    """
    if wanted == "tcg":
        return Verdict(Accelerator.TCG, "forced", fresh=False)
    if wanted == "kvm":
        if not facts.kvm:
            raise DeviceMissing(
                "cannot use KVM: /dev/kvm does not answer",
                hint="load kvm_intel or kvm_amd, or let Katapod emulate: --accel tcg",
            )
        return Verdict(Accelerator.KVM, "forced", fresh=False)
    key = _key(facts, kernel, initrd, qemu)
    proofs = _read_proofs(proof_file, facts.boot_id)
    if key in proofs.verdicts and not again:
        accelerator, reason = proofs.verdicts[key]
        return Verdict(accelerator, reason, fresh=False)
    verdict = await _find_verdict(facts, kernel, initrd, qemu, scratch_parent)
    proofs.verdicts[key] = (verdict.accelerator, verdict.reason)
    with contextlib.suppress(OSError, KatapodError):  # without the file, the next start finds out again
        proof_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(proof_file, msgspec.json.encode(proofs))
    return verdict


def kept_verdict(facts: HostFacts, kernel: Path, initrd: Path, qemu: str, proof_file: Path) -> Verdict | None:
    """What choose_accelerator would find for auto without a boot, or None. Raises OSError if a file is missing."""
    kept = _read_proofs(proof_file, facts.boot_id).verdicts.get(_key(facts, kernel, initrd, qemu))
    return None if kept is None else Verdict(*kept, fresh=False)


def _key(facts: HostFacts, kernel: Path, initrd: Path, qemu: str) -> str:
    return "|".join([file_identity(kernel), file_identity(initrd), file_identity(qemu), str(facts.kvm)])


async def _find_verdict(facts: HostFacts, kernel: Path, initrd: Path, qemu: str, scratch_parent: Path) -> Verdict:
    if not facts.kvm:
        return Verdict(Accelerator.TCG, "this host has no /dev/kvm", fresh=True)
    try:
        await prove_boot(kernel, initrd, qemu, Accelerator.KVM, limit_s=KVM_LIMIT_S, scratch_parent=scratch_parent)
    except (BootNotProven, QemuFailed) as exc:  # another error, a full disk say, tells nothing about KVM
        log.info("KVM is not used: %s", exc)
        return Verdict(Accelerator.TCG, "/dev/kvm opens, but the guest image does not boot under it", fresh=True)
    return Verdict(Accelerator.KVM, "the guest image boots under KVM", fresh=True)


async def accelerator_for(
    config: Config, facts: HostFacts, layout: Layout, sandbox_id: str, wanted: str = ""
) -> Verdict:
    """As choose_accelerator, for a sandbox whose state directory exists; `wanted`: empty for the configuration's."""
    return await choose_accelerator(
        wanted or config.katapod.accelerator,
        facts,
        Path(config.qemu.kernel),
        Path(config.qemu.initrd),
        config.qemu.path,
        layout.proof_file,
        layout.sandbox(sandbox_id).state,
    )


def _read_proofs(path: Path, boot_id: str) -> _Proofs:
    try:
        proofs = msgspec.json.decode(path.read_bytes(), type=_Proofs)
    except (OSError, msgspec.DecodeError):
        return _Proofs(boot_id, {})
    return proofs if proofs.boot_id == boot_id else _Proofs(boot_id, {})
