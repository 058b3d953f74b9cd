"""The QEMU command line that the walkthrough shows, against the one planned from the same configuration.

docs/walkthrough-qemu.md is the table: what the walkthrough has, what is here, and why where they differ.
"""

import re
import shlex
from pathlib import Path

import pytest

from katapod.host.facts import HostFacts
from katapod.model.config import parse_config
from katapod.model.layout import SHARE_TAG, Layout
from katapod.model.network import Interworking
from katapod.model.record import SandboxRecord
from katapod.model.sizing import ContainerLimits
from katapod.plan.virtiofsd import VirtiofsdImplementation
from katapod.sandbox.planning import SandboxPlan, plan_sandbox, size_for
from katapod.vmm.qemu.command_line import plan_kernel_params, plan_qemu
from katapod.vmm.qemu.hotplug import HotplugPlan, plan_shared_directory
from katapod.vmm.spec import Accelerator

DOC = Path(__file__).parents[3] / "docs" / "walkthrough-qemu.md"
SANDBOX = "42f003b365352a71ab87e8a1f49b1c301b6c3c856ec5520b4986aa8b9e43151f"
VM_DIR = f"/run/vc/vm/{SANDBOX}"
KERNEL = "/usr/lib/modules/4.18.0-305.12.1.el8_4.x86_64/vmlinuz"
IMAGES = "/var/cache/kata-containers/osbuilder-images/4.18.0-305.12.1.el8_4.x86_64"

COMMAND = f"""/usr/libexec/qemu-kiwi -name sandbox-{SANDBOX} -uuid 1cd86e5c-3f86-45e8-bce2-96b16dce635a
-machine q35,accel=kvm,kernel_irqchip -cpu host,pmu=off -qmp unix:{VM_DIR}/qmp.sock,server=on,wait=off
-m 2048M,slots=10,maxmem=33122M -device pci-bridge,bus=pcie.0,id=pci-bridge-0,chassis_nr=1,shpc=on,addr=2
-device virtio-serial-pci,disable-modern=false,id=serial0 -device virtconsole,chardev=charconsole0,id=console0
-chardev socket,id=charconsole0,path={VM_DIR}/console.sock,server=on,wait=off
-device virtio-scsi-pci,id=scsi0,disable-modern=false -object rng-random,id=rng0,filename=/dev/urandom
-device virtio-rng-pci,rng=rng0
-device vhost-vsock-pci,disable-modern=false,vhostfd=3,id=vsock-976011602,guest-cid=976011602
-chardev socket,id=char-b4b86634faff36bb,path={VM_DIR}/vhost-fs.sock
-device vhost-user-fs-pci,chardev=char-b4b86634faff36bb,tag=kataShared
-netdev tap,id=network-0,vhost=on,vhostfds=4,fds=5
-device driver=virtio-net-pci,netdev=network-0,mac=0a:58:0a:fe:01:1a,disable-modern=false,mq=on,vectors=4
-rtc base=utc,driftfix=slew,clock=host -global kvm-pit.lost_tick_policy=discard -vga none -no-user-config -nodefaults
-nographic --no-reboot -daemonize -object memory-backend-file,id=dimm1,size=2048M,mem-path=/dev/shm,share=on
-numa node,memdev=dimm1 -kernel {KERNEL} -initrd '{IMAGES}/"rhcos"-kata-4.18.0-305.12.1.el8_4.x86_64.initrd'
-append 'tsc=reliable no_timer_check rcupdate.rcu_expedited=1 i8042.direct=1 i8042.dumbkbd=1 i8042.nopnp=1
i8042.noaux=1 noreplace-smp reboot=k console=hvc0 console=hvc1 cryptomgr.notests net.ifnames=0 pci=lastbus=0 quiet
panic=1 nr_cpus=24 scsi_mod.scan=none' -pidfile {VM_DIR}/pid -smp 1,cores=1,threads=1,sockets=24,maxcpus=24"""
"""As the walkthrough shows it; quotes are added where the shell's were lost."""

CONFIGURATION = f"""
[hypervisor.qemu]
path = "/usr/libexec/qemu-kiwi"
kernel = "{KERNEL}"
initrd = '{IMAGES}/"rhcos"-kata-4.18.0-305.12.1.el8_4.x86_64.initrd'
machine_type = "q35"
machine_accelerators = "kernel_irqchip=on"
default_vcpus = 1
default_memory = 2048
memory_slots = 10
block_device_driver = "virtio-scsi"
entropy_source = "/dev/urandom"
shared_fs = "virtio-fs"
virtio_fs_daemon = "/usr/libexec/virtiofsd"
msize_9p = 8192
seccompsandbox = ""
reclaim_guest_freed_memory = false
[factory]
enable_template = false
[runtime]
sandbox_cgroup_only = true
disable_guest_seccomp = true
"""
"""What `kata-runtime env` and the command line of the walkthrough say of its file, which it does not print."""


@pytest.fixture(scope="module")
def plan() -> SandboxPlan:
    config = parse_config(CONFIGURATION.encode()).config
    facts = HostFacts(
        cpus=24,
        mem_mib=32868716 >> 10,
        kvm=True,
        vhost_vsock=True,
        boot_id="b",
        kernel_release="4.18.0",
        vhost_net=True,
    )
    return plan_sandbox(
        SandboxRecord(SANDBOX, created_at=0.0, supervisor_pid=1, boot_id="", auto_remove=True),
        config,
        facts,
        Layout(),
        accelerator=Accelerator.KVM,
        implementation=VirtiofsdImplementation.RUST,
        size=size_for(config, facts, (ContainerLimits(),)),
        hostname="mypod",
        shm_size_bytes=64 << 20,
    )


def shown(text: str) -> str:
    """As the page writes it."""
    text = text.replace(VM_DIR, "VMDIR").replace(SANDBOX, "ID").replace("1cd86e5c-3f86-45e8-bce2-96b16dce635a", "UUID")
    text = text.replace(f'{IMAGES}/"rhcos"-kata-4.18.0-305.12.1.el8_4.x86_64.initrd', "INITRD").replace(
        KERNEL, "KERNEL"
    )
    return re.sub(r"(?<=-uuid )[0-9a-f-]{36}", "UUID", text)


def walkthrough_options() -> list[str]:
    words = shlex.split(COMMAND)
    found = [words[0]]
    for word in words[1:]:
        if re.fullmatch(r"--?[a-z-]+", word):
            found.append(word)
        else:
            found[-1] += f" {word}"
    return [shown(option) for option in found if not option.startswith("-append ")]


def walkthrough_params() -> list[str]:
    words = shlex.split(COMMAND)
    return words[words.index("-append") + 1].split()


def our_options(plan: SandboxPlan) -> list[str]:
    qemu = plan_qemu(plan.vm)
    options = [str(option) for option in qemu.options if option.switch != "-append"]
    plugged = [plan_shared_directory(SHARE_TAG, 1)]
    return [shown(option) for option in [qemu.program, *options, *plugs(plugged)]]


def plugs(plans: list[HotplugPlan]) -> list[str]:
    """A plugged device as the option that it stands for."""
    found = []
    for step in [step for plan in plans for step in plan.steps]:
        values = dict(step.arguments)
        if step.command == "chardev-add":
            name = values["backend"]["data"]["addr"]["data"]["str"]
            found.append(f"chardev-add socket,id={values['id']},fd={name}")
        else:
            text = ",".join(f"{key}={value}" for key, value in values.items() if key != "driver")
            found.append(f"{step.command} {values['driver']},{text}")
    return found


def rows(heading: str) -> list[tuple[str, list[str], str]]:
    """(theirs, ours, why) of the table below a heading."""
    text = DOC.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == 3 and cells[0] not in ("In the walkthrough", "---"):
            theirs, ours, why = cells
            found.append((theirs.strip("`"), re.findall(r"`([^`]+)`", ours), why))
    return [(theirs if theirs != "-" else "", ours, why) for theirs, ours, why in found]


def test_every_option_of_the_walkthrough_has_a_row() -> None:
    assert [theirs for theirs, _, _ in rows("Devices and options") if theirs] == walkthrough_options()


def test_every_option_of_ours_has_a_row(plan: SandboxPlan) -> None:
    in_rows = [option for _, ours, _ in rows("Devices and options") for option in ours]
    network = [option for option in in_rows if option.startswith(("getfd", "netdev_add", "device_add virtio-net"))]
    assert sorted(set(in_rows) - set(network)) == sorted(our_options(plan))
    assert len(network) == 2  # see tests/unit/plan/test_network_plan.py


def test_every_kernel_parameter_has_a_row(plan: SandboxPlan) -> None:
    table = rows("Kernel command line")
    assert [word for theirs, _, _ in table for word in theirs.split()] == walkthrough_params()
    ours = " ".join(plan_kernel_params(plan.vm)).split()
    assert sorted(word for _, words, _ in table for text in words for word in text.split()) == sorted(ours)


@pytest.mark.parametrize("heading", ["Devices and options", "Kernel command line"])
def test_each_difference_has_a_reason(heading: str) -> None:
    table = rows(heading)
    assert table
    for theirs, ours, why in table:
        same = ours == [theirs]
        assert same == (why == "same"), f"{theirs!r} and {ours}: {why}"


def test_the_network_is_the_walkthroughs(plan: SandboxPlan) -> None:
    assert plan.network.model is Interworking.TCFILTER
    assert plan.network.vhost
