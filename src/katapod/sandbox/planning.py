"""From configuration and host facts to the plan of a sandbox. Nothing is acquired here."""

import os
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from katapod.host.facts import HostFacts, cpu_identity, file_identity, kvm_settings
from katapod.model.cni import NetworkConfig
from katapod.model.config import Config, config_kernel_params
from katapod.model.layout import Layout
from katapod.model.network import Interworking
from katapod.model.record import SandboxRecord
from katapod.model.sizing import ContainerLimits, HostCapacity, SizeSettings, VmSize, size_sandbox
from katapod.plan.cgroup import CgroupPlan
from katapod.plan.container_spec import DEFAULT_SHM_BYTES
from katapod.plan.network import DEFAULT_NETWORK, NetworkSettings
from katapod.plan.virtiofsd import VirtiofsdDialect, VirtiofsdPlan, plan_virtiofsd
from katapod.sandbox.vmms import DEFAULT_VMM
from katapod.vmm.devices import DEFAULT_DISKS, DiskSettings
from katapod.vmm.proof import ProofPlan, plan_proof
from katapod.vmm.protocol import Vmm
from katapod.vmm.spec import ANY_CID, NO_REMEDY, Accelerator, CpuRemedy, VmSpec
from katapod.vmm.template import TemplateLimits, TemplatePlan, plan_template

__all__ = [
    "RootDisk",
    "SandboxPlan",
    "default_template",
    "plan_ready_machine",
    "plan_sandbox",
    "proof_for",
    "size_for",
    "template_for",
    "usual_kernel_params",
]


@dataclass(frozen=True, slots=True)
class RootDisk:
    """The disk of a container's root file system: an `overlay` file, made when it is plugged, over the disk `base`."""

    disk_id: str
    overlay: Path
    base: Path


@dataclass(frozen=True, slots=True)
class SandboxPlan:
    """All that is decided before anything is acquired."""

    record: SandboxRecord
    vm: VmSpec  # as wanted; a clone starts with its template's size and grows to it
    virtiofsd: VirtiofsdPlan
    hostname: str
    dns: tuple[str, ...]
    shm_size_bytes: int
    agent_timeout_s: float
    template: TemplatePlan | None = None  # None: always boot
    root_disk: RootDisk | None = None  # of the first container: the guest finds it as it begins to run
    machine_key: str = (
        ""  # equal for machines that differ in names and size only; empty: a file of the guest is missing
    )
    virtio_fs_queue_size: int = 1024
    kernel_modules: tuple[str, ...] = ()
    cgroup: CgroupPlan | None = None  # None: the sandbox stays in the cgroups of its owner
    console_limit_bytes: int = 256 * 1024
    netns: Path | None = None  # the pod's network namespace; None: the guest has loopback only
    network: NetworkSettings = DEFAULT_NETWORK
    disks: DiskSettings = DEFAULT_DISKS
    bind_mounts: tuple[Path, ...] = ()  # of the host, shown to the guest read-only
    guest_hook_path: str = ""
    proof_key: str = ""  # of the verdict that KVM works; empty: nothing was proven
    vmm: Vmm = DEFAULT_VMM

    def describe(self) -> str:
        cgroup = [self.cgroup.describe()] if self.cgroup is not None else []
        return "\n".join([self.vmm.describe(self.vm), self.virtiofsd.describe(), *cgroup])


def size_for(
    config: Config, facts: HostFacts, limits: tuple[ContainerLimits, ...], *, translation_cache_mib: int = 0
) -> VmSize:
    """The size of the VM for its containers; UsageError if it does not fit the host."""
    capacity = HostCapacity(cpus=facts.cpus, memory_mib=facts.mem_mib)
    return size_sandbox(SizeSettings.of(config), capacity, limits, translation_cache_mib=translation_cache_mib)


# long: what a plan is made of, each from another source, by name
def plan_sandbox(
    record: SandboxRecord,
    config: Config,
    facts: HostFacts,
    layout: Layout,
    *,
    accelerator: Accelerator,
    dialect: VirtiofsdDialect,
    size: VmSize,
    hostname: str,
    dns: tuple[str, ...] = (),
    shm_size_bytes: int,
    netns: Path | None = None,
    cgroup: CgroupPlan | None = None,
    root_disk: RootDisk | None = None,
    remedy: CpuRemedy = NO_REMEDY,
    proof_key: str = "",
    vmm: Vmm = DEFAULT_VMM,
) -> SandboxPlan:
    """Plan the sandbox of `record`, of this `size`, with the interfaces of the network namespace `netns`, which is ours
    if the record has an attachment to a network, and an engine's else.

    `accelerator`, `remedy` and `proof_key` are those of a Verdict.
    """
    qemu, paths = config.qemu, layout.sandbox(record.sandbox_id)
    vm = _plan_vm(vmm, record.sandbox_id, config, facts, accelerator, size, paths.vm, remedy)
    template = template_for(config, vm, vmm)
    record = msgspec.structs.replace(
        record, accelerator=accelerator.value, kernel=qemu.kernel, vcpus=size.vcpus, mem_mib=size.mem_mib
    )
    attached_to = record.attachment.config if record.attachment is not None else None
    return SandboxPlan(
        record=record,
        vm=vm,
        template=template if config.factory.enable_template and not _takes_all_memory(vm) else None,
        machine_key=template.key if template is not None else "",
        virtiofsd=plan_virtiofsd(
            qemu.virtio_fs_daemon,
            dialect,
            paths.shared,
            cache=qemu.virtio_fs_cache,
            extra_args=qemu.virtio_fs_extra_args,
        ),
        hostname=hostname,
        dns=dns,
        shm_size_bytes=shm_size_bytes,
        agent_timeout_s=float(config.agent.dial_timeout),
        virtio_fs_queue_size=qemu.virtio_fs_queue_size,
        kernel_modules=config.agent.kernel_modules,
        cgroup=cgroup,
        console_limit_bytes=config.katapod.console_log_kib * 1024,
        netns=netns,
        network=NetworkSettings(
            model=Interworking(config.runtime.internetworking_model),
            vhost=facts.vhost_net and not qemu.disable_vhost_net,
            rx_rate=qemu.rx_rate_limiter_max_rate,
            tx_rate=qemu.tx_rate_limiter_max_rate,
            held=_is_held(config, attached_to),
        ),
        disks=_disks(config),
        bind_mounts=tuple(Path(path) for path in config.runtime.sandbox_bind_mounts),
        guest_hook_path=qemu.guest_hook_path,
        root_disk=root_disk,
        proof_key=proof_key if accelerator is Accelerator.KVM else "",
        vmm=vmm,
    )


def _is_held(config: Config, network: NetworkConfig | None) -> bool:
    """Whether the guest may send from its own addresses only. A network can say itself that it wants no such check,
    by the key that the plugin `bridge` has for its own."""
    if network is not None and any(plugin.settings.get("macspoofchk") is False for plugin in network.plugins):
        return False
    return config.katapod.spoof_check == "all" or (network is not None and config.katapod.spoof_check == "run")


def _takes_all_memory(vm: VmSpec) -> bool:
    """A clone has copied pages of its own at once, which is what templates are there to spare."""
    return vm.preallocated or vm.hugepages


def _disks(config: Config) -> DiskSettings:
    qemu = config.qemu
    return DiskSettings(
        aio=qemu.block_device_aio,
        cache_set=qemu.block_device_cache_set,
        direct=qemu.block_device_cache_direct,
        no_flush=qemu.block_device_cache_noflush,
        logical_sector_bytes=qemu.block_device_logical_sector_size,
        physical_sector_bytes=qemu.block_device_physical_sector_size,
        iothreads=qemu.indep_iothreads or int(qemu.enable_iothreads),
    )


# long: as plan_sandbox
def plan_ready_machine(
    record: SandboxRecord,
    config: Config,
    facts: HostFacts,
    layout: Layout,
    *,
    accelerator: Accelerator,
    dialect: VirtiofsdDialect,
    remedy: CpuRemedy = NO_REMEDY,
    proof_key: str = "",
    vmm: Vmm = DEFAULT_VMM,
) -> SandboxPlan:
    """Plan a machine that is to become anybody's sandbox: as small as one can be, since it grows when it is taken."""
    usual = size_for(config, facts, (ContainerLimits(),))
    small = min(config.katapod.template_memory, usual.mem_mib)
    return plan_sandbox(
        record,
        config,
        facts,
        layout,
        accelerator=accelerator,
        dialect=dialect,
        size=msgspec.structs.replace(usual, mem_mib=small, vcpus=1),
        hostname=record.sandbox_id,
        shm_size_bytes=DEFAULT_SHM_BYTES,
        remedy=remedy,
        proof_key=proof_key,
        vmm=vmm,
    )


def _plan_vm(
    vmm: Vmm,
    sandbox_id: str,
    config: Config,
    facts: HostFacts,
    accelerator: Accelerator,
    size: VmSize,
    vm_dir: Path,
    remedy: CpuRemedy = NO_REMEDY,
) -> VmSpec:
    qemu = config.qemu
    features = qemu.cpu_features if accelerator is Accelerator.KVM else _without_pmu(qemu.cpu_features)
    vm = VmSpec(
        sandbox_id=sandbox_id,
        uuid=str(uuid.uuid4()),
        program=vmm.program(config),
        kernel=Path(qemu.kernel),
        initrd=Path(qemu.initrd),
        accelerator=accelerator,
        mem_mib=size.mem_mib,
        max_mem_mib=size.max_mem_mib,
        vcpus=size.vcpus,
        max_vcpus=size.max_vcpus,
        vm_dir=vm_dir,
        cpu_features=features,
        remedy=remedy,
        entropy_source=qemu.entropy_source,
        kernel_params=config_kernel_params(config),
        debug=qemu.enable_debug,
        debug_console=config.agent.debug_console_enabled or _asks_for_console(qemu.kernel_params),
        vsock_cid=ANY_CID if facts.vhost_vsock else None,
        preallocated=qemu.enable_mem_prealloc,
        hugepages=qemu.enable_hugepages,
        reports_free_pages=qemu.reclaim_guest_freed_memory,
        options=vmm.options(config),
        translation_cache_mib=config.katapod.translation_cache if accelerator is Accelerator.TCG else 0,
    )
    return vm if vmm.capabilities(vm).vsock else replace(vm, vsock_cid=None)


def default_template(
    config: Config,
    facts: HostFacts,
    accelerator: Accelerator,
    remedy: CpuRemedy = NO_REMEDY,
    vmm: Vmm = DEFAULT_VMM,
) -> TemplatePlan | None:
    """The template of a sandbox whose containers have no limits; None as with template_for."""
    size = size_for(config, facts, (ContainerLimits(),))
    return template_for(config, _plan_vm(vmm, "template", config, facts, accelerator, size, Path("/none"), remedy), vmm)


def proof_for(config: Config, facts: HostFacts, vmm: Vmm = DEFAULT_VMM) -> ProofPlan:
    """What has to boot before KVM is used: the machine of a sandbox whose containers have no limits.

    Where there is no KVM one answer holds for all. Raises OSError if a file that it names is missing.
    """
    size = size_for(config, facts, (ContainerLimits(),))
    vm = _plan_vm(vmm, "proof", config, facts, Accelerator.KVM, size, Path("/none"))
    identities = [file_identity(path) for path in vmm.files(vm)]
    identities.append(kvm_settings())
    plan = plan_proof(vmm, vm, identities, initrd_identity=file_identity(vm.initrd))
    return plan if facts.kvm else replace(plan, key="without /dev/kvm")


def template_for(config: Config, vm: VmSpec, vmm: Vmm = DEFAULT_VMM) -> TemplatePlan | None:
    """The template that `vm` is cloned from; None where a file is missing: a cold boot says which."""
    settings = config.katapod
    if not vmm.capabilities(vm).templates:
        return None
    try:
        identities = [file_identity(path) for path in (*vmm.files(vm), vm.initrd)]
    except OSError:
        return None
    if vm.accelerator is Accelerator.KVM:
        identities.append(cpu_identity())
    limits = TemplateLimits(
        max_age_s=settings.template_max_age * 60.0,
        max_uses=settings.template_max_uses,
        unused_s=settings.template_max_age * 60.0,
        boot_s=float(config.agent.dial_timeout),
    )
    root = Path(config.factory.template_path)
    return plan_template(vmm, vm, identities, root, limits, mem_mib=settings.template_memory)


def usual_kernel_params(config: Config, vmm: Vmm = DEFAULT_VMM) -> str:
    """The kernel's command line of an emulated guest whose vCPUs are at most the host's."""
    qemu, cpus = config.qemu, len(os.sched_getaffinity(0))
    vm = VmSpec(
        sandbox_id="",
        uuid="",
        program=vmm.program(config),
        kernel=Path(qemu.kernel),
        initrd=Path(qemu.initrd),
        accelerator=Accelerator.TCG,
        mem_mib=qemu.default_memory,
        max_mem_mib=qemu.default_memory,
        vcpus=1,
        max_vcpus=min(qemu.default_maxvcpus or cpus, cpus),
        vm_dir=Path("/none"),
        kernel_params=config_kernel_params(config),
        debug=qemu.enable_debug,
        debug_console=config.agent.debug_console_enabled,
    )
    return vmm.kernel_params(vm)


def _asks_for_console(kernel_params: str) -> bool:
    """How the console was switched on before there was a key for it."""
    return any(word.partition("=")[0] == "agent.debug_console" for word in kernel_params.split())


def _without_pmu(features: str) -> str:
    """The emulated CPU has no PMU that could be switched off: `pmu=off`, the default, means nothing there."""
    return ",".join(part for part in features.split(",") if part not in ("", "pmu=off"))
