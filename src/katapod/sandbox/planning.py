"""From configuration and host facts to the plan of a sandbox. Nothing is acquired here."""

import os
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from katapod.host.cgroup import prepare_cgroup
from katapod.host.facts import HostFacts, cpu_identity, file_identity, host_tsc_khz, kvm_settings
from katapod.model.cni import NetworkConfig
from katapod.model.config import Config
from katapod.model.layout import Layout
from katapod.model.network import Interworking
from katapod.model.record import SandboxRecord
from katapod.model.sizing import ContainerLimits, HostCapacity, SizeSettings, VmSize, processes_mib, size_sandbox
from katapod.model.tokens import new_uuid
from katapod.model.uid_range import parse_uid_range
from katapod.plan.cgroup import CgroupPlan
from katapod.plan.container_spec import DEFAULT_SHM_BYTES
from katapod.plan.network import DEFAULT_NETWORK, NetworkSettings
from katapod.plan.virtiofsd import VirtiofsdImplementation, VirtiofsdPlan, plan_virtiofsd
from katapod.sandbox.vmms import DEFAULT_VMM, vmm_of
from katapod.vmm.devices import DEFAULT_DISKS, DiskSettings
from katapod.vmm.proof import ProofPlan, plan_proof
from katapod.vmm.protocol import Capabilities, Vmm
from katapod.vmm.spec import ANY_CID, NO_REMEDY, Accelerator, CpuRemedy, VmSpec
from katapod.vmm.template import TemplateLimits, TemplatePlan, plan_template

__all__ = [
    "RootDisk",
    "SandboxPlan",
    "default_template",
    "plan_ready_machine",
    "plan_sandbox",
    "proof_for",
    "capabilities_of",
    "cgroup_for",
    "size_for",
    "template_for",
    "usual_kernel_params",
]


class RootDisk(Struct, frozen=True):
    """The disk of a container's root file system: an `overlay` file, made when it is plugged, over the disk `base`; one
    that is `kept` is there already when the container is started again."""

    disk_id: str
    overlay: Path
    base: Path
    kept: bool = False


class SandboxPlan(Struct, frozen=True):
    """All that is decided before anything is acquired."""

    record: SandboxRecord
    vm: VmSpec  # as wanted; a clone starts with its template's size and grows to it
    virtiofsd: VirtiofsdPlan
    hostname: str
    dns: tuple[str, ...]
    shm_size_bytes: int
    agent_timeout_s: float
    shares: bool = True  # from the start; else a container that needs it has the shared directory plugged
    template: TemplatePlan | None = None  # None: always boot
    root_disk: RootDisk | None = None  # of the first container: the guest finds it as it begins to run
    machine_key: str = (
        ""  # equal for machines that differ in names and size only; empty: a file of the guest is missing
    )
    virtio_fs_queue_size: int = 1024
    kernel_modules: tuple[str, ...] = ()
    cgroup: CgroupPlan | None = None  # None: the sandbox stays in the cgroups of its supervisor
    console_limit_bytes: int = 256 * 1024
    netns: Path | None = None  # the pod's network namespace; None: the guest has loopback only
    network: NetworkSettings = DEFAULT_NETWORK
    disks: DiskSettings = DEFAULT_DISKS
    bind_mounts: tuple[Path, ...] = ()  # of the host, shown to the guest read-only
    guest_hook_path: str = ""
    proof_key: str = ""  # of the proof that KVM works; empty: nothing was proven
    vmm: Vmm = DEFAULT_VMM

    def describe(self) -> str:
        cgroup = [self.cgroup.describe()] if self.cgroup is not None else []
        share = [self.virtiofsd.describe()] if self.shares else []
        return "\n".join([self.vmm.describe(self.vm), *share, *cgroup])


def size_for(
    config: Config, facts: HostFacts, limits: tuple[ContainerLimits, ...], *, translation_cache_mib: int = 0
) -> VmSize:
    """The size of the VM for its containers; UsageError if it does not fit the host."""
    capacity = HostCapacity(cpus=facts.cpus, memory_mib=facts.mem_mib)
    return size_sandbox(SizeSettings.of(config), capacity, limits, translation_cache_mib=translation_cache_mib)


def cgroup_for(
    sandbox_id: str, cgroups_path: str | None, config: Config, size: VmSize, accelerator: Accelerator
) -> CgroupPlan | None:
    """The groups of a sandbox; `cgroups_path` as of SandboxRequest. Raises SpecError.

    Under User-mode Linux memory has a limit by default: the guest's kernel is a program, which whoever has taken it
    over can have take more than the guest's memory.
    """
    uml = accelerator is Accelerator.UML
    return prepare_cgroup(
        sandbox_id,
        cgroups_path,
        sandbox_cgroup_only=config.runtime.sandbox_cgroup_only,
        mem_mib=size.mem_mib,
        beside_mib=size.host_overhead_mib + (processes_mib(size.mem_mib) if uml else config.katapod.translation_cache),
        limited=uml,
    )


# long: what a plan is made of, each from another source, by name
def plan_sandbox(
    record: SandboxRecord,
    config: Config,
    facts: HostFacts,
    layout: Layout,
    *,
    accelerator: Accelerator,
    implementation: VirtiofsdImplementation | None = None,
    size: VmSize,
    hostname: str,
    dns: tuple[str, ...] = (),
    shm_size_bytes: int,
    netns: Path | None = None,
    cgroup: CgroupPlan | None = None,
    root_disk: RootDisk | None = None,
    shares: bool = True,
    remedy: CpuRemedy = NO_REMEDY,
    proof_key: str = "",
    vmm: Vmm | None = None,
) -> SandboxPlan:
    """Plan the sandbox of `record`, of this `size`, with the interfaces of the network namespace `netns`, which is ours
    if the record has an attachment to a network, and an engine's else.

    Without `shares` nothing is shared with the guest as far as is known; a VMM that could not share it later does so
    from the start. `accelerator`, `remedy` and `proof_key` are those of an AcceleratorChoice.
    """
    vmm = vmm or vmm_of(accelerator)
    qemu, paths = config.qemu, layout.sandbox(record.sandbox_id)
    vm = _plan_vm(vmm, record.sandbox_id, config, facts, accelerator, size, paths.vm, remedy)
    capabilities = vmm.capabilities(vm)
    kind = _kind_of(config, vm, vmm)
    template = kind if capabilities.templates else None
    record = msgspec.structs.replace(
        record, accelerator=accelerator.value, kernel=str(vm.kernel), vcpus=size.vcpus, mem_mib=size.mem_mib
    )
    attached_to = record.attachment.config if record.attachment is not None else None
    return SandboxPlan(
        record=record,
        vm=vm,
        template=template if config.factory.enable_template and not _takes_all_memory(vm) else None,
        machine_key=kind.key if kind is not None else "",
        virtiofsd=plan_virtiofsd(
            qemu.virtio_fs_daemon,
            implementation,
            paths.shared,
            cache=qemu.virtio_fs_cache,
            extra_args=qemu.virtio_fs_extra_args,
        ),
        hostname=hostname,
        dns=dns,
        shm_size_bytes=shm_size_bytes,
        shares=shares
        or not (capabilities.disk_slots and capabilities.hotplug)
        or bool(config.runtime.sandbox_bind_mounts),
        agent_timeout_s=float(config.agent.dial_timeout),
        virtio_fs_queue_size=qemu.virtio_fs_queue_size,
        kernel_modules=config.agent.kernel_modules,
        cgroup=cgroup,
        console_limit_bytes=config.katapod.console_log_kib * 1024,
        netns=netns,
        network=NetworkSettings(
            model=Interworking(config.runtime.internetworking_model),
            vhost=facts.vhost_net and not qemu.disable_vhost_net and not capabilities.taps_by_name,
            rx_rate=qemu.rx_rate_limiter_max_rate,
            tx_rate=qemu.tx_rate_limiter_max_rate,
            held=_is_held(config, attached_to),
        ),
        disks=_disks(config),
        bind_mounts=tuple(Path(path) for path in config.runtime.sandbox_bind_mounts),
        guest_hook_path=qemu.guest_hook_path,
        root_disk=root_disk if capabilities.disk_slots else None,
        proof_key=proof_key if accelerator is not Accelerator.TCG else "",
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
    implementation: VirtiofsdImplementation | None = None,
    remedy: CpuRemedy = NO_REMEDY,
    proof_key: str = "",
    vmm: Vmm | None = None,
) -> SandboxPlan:
    """Plan a machine that is to become anybody's sandbox: as small as one can be, since it grows when it is taken;
    where it cannot grow, of the size for containers without limits."""
    usual = size_for(config, facts, (ContainerLimits(),))
    grows = capabilities_of(config, facts, accelerator).memory_hotplug
    mem_mib = min(config.katapod.template_memory, usual.mem_mib) if grows else usual.mem_mib
    size = msgspec.structs.replace(usual, mem_mib=mem_mib, vcpus=1)
    cgroup = cgroup_for(record.sandbox_id, None, config, size, accelerator)
    plan = plan_sandbox(
        msgspec.structs.replace(record, cgroups=cgroup.directories if cgroup is not None else ()),
        config,
        facts,
        layout,
        accelerator=accelerator,
        implementation=implementation,
        size=size,
        hostname=record.sandbox_id,
        shm_size_bytes=DEFAULT_SHM_BYTES,
        cgroup=cgroup,
        shares=config.katapod.rootfs != "disk",
        remedy=remedy,
        proof_key=proof_key,
        vmm=vmm,
    )
    return replace(plan, vm=replace(plan.vm, standby=True))


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
    kernel, initrd = vmm.guest(config)
    features = qemu.cpu_features if accelerator is Accelerator.KVM else _without_pmu(qemu.cpu_features)
    vm = VmSpec(
        sandbox_id=sandbox_id,
        uuid=new_uuid(),
        program=vmm.program(config),
        kernel=kernel,
        initrd=initrd,
        accelerator=accelerator,
        mem_mib=size.mem_mib,
        max_mem_mib=size.max_mem_mib,
        vcpus=size.vcpus,
        max_vcpus=size.max_vcpus,
        vm_dir=vm_dir,
        cpu_features=features,
        remedy=remedy,
        entropy_source=qemu.entropy_source,
        kernel_params=vmm.guest_params(config),
        debug=qemu.enable_debug,
        debug_console=config.agent.debug_console_enabled or _asks_for_console(vmm.guest_params(config)),
        vsock_cid=ANY_CID if facts.vhost_vsock else None,
        preallocated=qemu.enable_mem_prealloc,
        hugepages=qemu.enable_hugepages,
        reports_free_pages=qemu.reclaim_guest_freed_memory,
        options=vmm.options(config),
        uids=parse_uid_range(config.katapod.jail_uids),
        translation_cache_mib=config.katapod.translation_cache if accelerator is Accelerator.TCG else 0,
        tsc_khz=host_tsc_khz() if accelerator is Accelerator.TCG else 0,
    )
    return vm if vmm.capabilities(vm).vsock else replace(vm, vsock_cid=None)


def default_template(
    config: Config,
    facts: HostFacts,
    accelerator: Accelerator,
    remedy: CpuRemedy = NO_REMEDY,
    vmm: Vmm | None = None,
) -> TemplatePlan | None:
    """The template of a sandbox whose containers have no limits; None as with template_for."""
    vmm = vmm or vmm_of(accelerator)
    size = size_for(config, facts, (ContainerLimits(),))
    return template_for(config, _plan_vm(vmm, "template", config, facts, accelerator, size, Path("/none"), remedy), vmm)


def capabilities_of(config: Config, facts: HostFacts, accelerator: Accelerator) -> Capabilities:
    """Of the machine that a sandbox gets with it."""
    vmm = vmm_of(accelerator)
    size = size_for(config, facts, (ContainerLimits(),))
    return vmm.capabilities(_plan_vm(vmm, "none", config, facts, accelerator, size, Path("/none")))


def proof_for(
    config: Config, facts: HostFacts, accelerator: Accelerator = Accelerator.KVM, vmm: Vmm | None = None
) -> ProofPlan:
    """What has to boot before the accelerator is used: the machine of a sandbox whose containers have no limits.

    Where there is no KVM one answer holds for all. Raises OSError if a file that it names is missing.
    """
    vmm = vmm or vmm_of(accelerator)
    size = size_for(config, facts, (ContainerLimits(),))
    vm = _plan_vm(vmm, "proof", config, facts, accelerator, size, Path("/none"))
    identities = [file_identity(path) for path in vmm.files(vm)]
    if accelerator is Accelerator.KVM:
        identities.append(kvm_settings())
    plan = plan_proof(vmm, vm, identities, initrd_identity=file_identity(vm.initrd))
    without = accelerator is Accelerator.KVM and not facts.kvm
    return replace(plan, key="without /dev/kvm") if without else plan


def template_for(config: Config, vm: VmSpec, vmm: Vmm = DEFAULT_VMM) -> TemplatePlan | None:
    """The template that `vm` is cloned from; None where a file is missing: a cold boot says which."""
    return _kind_of(config, vm, vmm) if vmm.capabilities(vm).templates else None


def _kind_of(config: Config, vm: VmSpec, vmm: Vmm) -> TemplatePlan | None:
    """Its key is equal for machines that differ in names and size only, whether or not there are templates."""
    settings = config.katapod
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
    kernel, initrd = vmm.guest(config)
    vm = VmSpec(
        sandbox_id="",
        uuid="",
        program=vmm.program(config),
        kernel=kernel,
        initrd=initrd,
        accelerator=Accelerator.TCG,
        mem_mib=qemu.default_memory,
        max_mem_mib=qemu.default_memory,
        vcpus=1,
        max_vcpus=min(qemu.default_maxvcpus or cpus, cpus),
        vm_dir=Path("/none"),
        kernel_params=vmm.guest_params(config),
        debug=qemu.enable_debug,
        debug_console=config.agent.debug_console_enabled,
        tsc_khz=host_tsc_khz(),
    )
    return vmm.kernel_params(vm)


def _asks_for_console(kernel_params: tuple[str, ...]) -> bool:
    """How the console was switched on before there was a key for it."""
    return any(word.partition("=")[0] == "agent.debug_console" for word in kernel_params)


def _without_pmu(features: str) -> str:
    """The emulated CPU has no PMU that could be switched off: `pmu=off`, the default, means nothing there."""
    return ",".join(part for part in features.split(",") if part not in ("", "pmu=off"))
