"""The accelerator's verdict: what is forced, what is remembered, and for how long."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from katapod.host.facts import HostFacts
from katapod.model.errors import DeviceMissing, MissingProgram
from katapod.plan.vmm import Accelerator
from katapod.sandbox.proof import Verdict, choose_accelerator, kept_verdict

FACTS = HostFacts(cpus=2, mem_mib=4096, kvm=False, vhost_vsock=False, boot_id="boot-1", kernel_release="6.1")


class Host:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.proofs = root / "cache" / "accelerator.json"
        for name in ("kernel", "initrd", "qemu"):
            (root / name).write_text(name)

    async def choose(self, wanted: str = "auto", facts: HostFacts = FACTS) -> Verdict:
        kernel, initrd, qemu = (self.root / name for name in ("kernel", "initrd", "qemu"))
        return await choose_accelerator(wanted, facts, kernel, initrd, str(qemu), self.proofs, self.root)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


async def test_forced(host: Host) -> None:
    assert await host.choose("tcg") == Verdict(Accelerator.TCG, "forced", fresh=False)
    assert await host.choose("kvm", replace(FACTS, kvm=True)) == Verdict(Accelerator.KVM, "forced", fresh=False)
    with pytest.raises(DeviceMissing, match="cannot use KVM: /dev/kvm does not answer"):
        await host.choose("kvm")
    assert not host.proofs.exists()


async def test_a_verdict_is_told_once_and_kept(host: Host) -> None:
    first = await host.choose()
    assert first == Verdict(Accelerator.TCG, "this host has no /dev/kvm", fresh=True)
    assert await host.choose() == replace(first, fresh=False)


async def test_a_kept_verdict_can_be_looked_at_and_asked_for_again(host: Host) -> None:
    files = (host.root / "kernel", host.root / "initrd", str(host.root / "qemu"), host.proofs)
    assert kept_verdict(FACTS, *files) is None
    first = await host.choose()
    assert kept_verdict(FACTS, *files) == replace(first, fresh=False)
    assert kept_verdict(replace(FACTS, boot_id="boot-2"), *files) is None
    kernel, initrd, qemu, proofs = files
    assert (await choose_accelerator("auto", FACTS, kernel, initrd, qemu, proofs, host.root, again=True)).fresh


async def test_another_boot_another_image_another_verdict(host: Host) -> None:
    await host.choose()
    assert (await host.choose(facts=replace(FACTS, boot_id="boot-2"))).fresh
    assert not (await host.choose(facts=replace(FACTS, boot_id="boot-2"))).fresh
    (host.root / "new").write_text("rebuilt")
    (host.root / "new").replace(host.root / "initrd")
    assert (await host.choose(facts=replace(FACTS, boot_id="boot-2"))).fresh


@pytest.mark.parametrize("text", ["", "{", "[]", '{"boot_id": "boot-1", "verdicts": {"KEY": ["warp", "x"]}}'])
async def test_a_spoilt_file_is_no_obstacle(host: Host, text: str) -> None:
    await host.choose()
    key = next(iter(msgspec.json.decode(host.proofs.read_bytes())["verdicts"]))
    host.proofs.write_text(text.replace("KEY", key))
    assert (await host.choose()).accelerator is Accelerator.TCG


async def test_a_place_that_cannot_be_written_is_no_obstacle(host: Host) -> None:
    (host.root / "cache").write_text("a file")
    assert (await host.choose()).fresh
    assert (await host.choose()).fresh


async def test_a_host_without_qemu_is_no_verdict_on_kvm(host: Host) -> None:
    """A missing program, a full disk: they say nothing about KVM, and must not be remembered as if they did."""
    with pytest.raises(MissingProgram, match=r"cannot run .*/qemu"):  # it is there, but not executable
        await host.choose(facts=replace(FACTS, kvm=True))
    assert not host.proofs.exists()
