"""The explained command line: that of the walkthrough, our own, and what nobody knows."""

from pathlib import Path

from katapod.model.inspection import UNKNOWN_PART
from katapod.observe.explain import explain_kernel_parameters
from katapod.vmm.qemu.command_line import FdSlot, QemuOptions, plan_qemu, render_qemu
from katapod.vmm.qemu.explain import explain_command_line, word_after
from katapod.vmm.spec import Accelerator, VmSpec

COMMAND = """
/usr/libexec/qemu-kiwi -name sandbox-42f0 -uuid 1cd86e5c-3f86-45e8-bce2-96b16dce635a -machine
q35,accel=kvm,kernel_irqchip -cpu host,pmu=off -qmp unix:/run/vc/vm/42f0/qmp.sock,server=on,wait=off -m
2048M,slots=10,maxmem=33122M -device pci-bridge,bus=pcie.0,id=pci-bridge-0,chassis_nr=1,shpc=on,addr=2
-device virtio-serial-pci,disable-modern=false,id=serial0 -device
virtconsole,chardev=charconsole0,id=console0 -chardev
socket,id=charconsole0,path=/run/vc/vm/42f0/console.sock,server=on,wait=off -device
virtio-scsi-pci,id=scsi0,disable-modern=false -object rng-random,id=rng0,filename=/dev/urandom -device
virtio-rng-pci,rng=rng0 -device vhost-vsock-pci,disable-modern=false,vhostfd=3,id=vsock-9,guest-cid=9
-chardev socket,id=char-b4,path=/run/vc/vm/42f0/vhost-fs.sock -device
vhost-user-fs-pci,chardev=char-b4,tag=kataShared -netdev tap,id=network-0,vhost=on,vhostfds=4,fds=5 -device
driver=virtio-net-pci,netdev=network-0,mac=0a:58:0a:fe:01:1a,disable-modern=false,mq=on,vectors=4 -rtc
base=utc,driftfix=slew,clock=host -global kvm-pit.lost_tick_policy=discard -vga none -no-user-config
-nodefaults -nographic --no-reboot -daemonize -object
memory-backend-file,id=dimm1,size=2048M,mem-path=/dev/shm,share=on -numa node,memdev=dimm1 -kernel
/usr/lib/modules/4.18/vmlinuz -initrd
/var/cache/kata-containers/osbuilder-images/4.18/rhcos-kata-4.18.initrd
"""
WALKTHROUGH = COMMAND.split()
PARAMETERS = (
    "tsc=reliable no_timer_check rcupdate.rcu_expedited=1 i8042.direct=1 i8042.dumbkbd=1 i8042.nopnp=1 "
    "i8042.noaux=1 noreplace-smp reboot=k console=hvc0 console=hvc1 cryptomgr.notests net.ifnames=0 pci=lastbus=0 "
    "quiet panic=1 nr_cpus=24 scsi_mod.scan=none agent.debug_console agent.debug_console_vport=1026"
)
END = ["-pidfile", "/run/vc/vm/42f0/pid", "-smp", "1,cores=1,threads=1,sockets=24,maxcpus=24"]


def test_all_of_the_walkthrough_is_known() -> None:
    parts = explain_command_line([*WALKTHROUGH, "-append", PARAMETERS, *END])
    known = [detail for part in parts for detail in (part, *part.details)]
    assert [part.part for part in known if not part.known] == []
    assert [part.part.split(" ")[0] for part in parts[1:]] == [
        word for word in [*WALKTHROUGH, "-append", *END] if word.startswith("-")
    ]
    assert [part.part for part in explain_kernel_parameters(PARAMETERS) if not part.known] == []
    bridge = next(part for part in parts if "pci-bridge" in part.part)
    assert "hot-plug" in bridge.meaning
    assert [detail.part for detail in bridge.details][:2] == ["bus=pcie.0", "id=pci-bridge-0"]


def test_all_of_our_own_is_known() -> None:
    for accelerator, restored, cid in ((Accelerator.KVM, False, 3), (Accelerator.TCG, True, None)):
        spec = VmSpec(
            sandbox_id="s,1",
            uuid="u",
            program="qemu-system-x86_64",
            kernel=Path("/k"),
            initrd=Path("/i"),
            accelerator=accelerator,
            mem_mib=256,
            max_mem_mib=2048,
            vcpus=1,
            max_vcpus=2,
            vm_dir=Path("/run/vc/vm/s1"),
            vsock_cid=cid,
            debug_console=True,
            memory_is_given=restored,
            restored=restored,
            translation_cache_mib=128,
            options=QemuOptions(memory_slots=10),
        )
        plan = plan_qemu(spec)
        words = render_qemu(plan, dict.fromkeys(FdSlot, 9))
        parts = explain_command_line(words)
        unknown = [part.part for whole in parts for part in (whole, *whole.details) if not part.known]
        assert unknown == []
        assert " ".join(part.part for part in parts) == " ".join(words)
        assert [one.part for one in explain_kernel_parameters(word_after(words, "-append")) if not one.known] == []


def test_the_unknown_is_shown_as_it_is() -> None:
    parts = explain_command_line(["qemu", "-frobnicate", "a,b=c", "-device", "new-pci,id=x,y=1", "-S", "-new"])
    assert [(part.part, part.known) for part in parts[1:]] == [
        ("-frobnicate a,b=c", False),
        ("-device new-pci,id=x,y=1", False),
        ("-S", True),
        ("-new", False),
    ]
    assert [(detail.part, detail.meaning) for detail in parts[2].details][1] == ("y=1", UNKNOWN_PART)
    assert explain_kernel_parameters("what=ever =")[0].known is False
    assert explain_command_line([]) == ()
