"""Verdicts on the machine: CPU, accelerator, devices, cgroups, network, storage, limits. Pure."""

from katapod.observe.check_facts import (
    CheckFacts,
    DeviceFacts,
    Line,
    ModuleState,
    Outcome,
    SpaceFacts,
    Trial,
    install,
)
from katapod.observe.check_rungs import NO_KVM, judge_accelerators

__all__ = [
    "judge_capabilities",
    "judge_cgroup",
    "judge_cni",
    "judge_cpu",
    "judge_device",
    "judge_kvm_device",
    "judge_jail",
    "judge_machine",
    "judge_memory",
    "judge_network",
    "judge_open_files",
    "judge_overlay",
    "judge_space",
    "judge_template_place",
]

ARCHITECTURE = "x86_64"
VIRTUALISATION = {"GenuineIntel": "vmx", "AuthenticAMD": "svm"}
NEEDED_CONTROLLERS = ("cpu", "memory")
NEEDED_CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_MKNOD", "CAP_DAC_OVERRIDE", "CAP_CHOWN")
BRIDGE_PLUGINS = ("bridge", "host-local", "loopback")
MORE_PLUGINS = ("portmap", "firewall")
NOFILE_WANTED = 65536
SMALL_MEMORY_MIB = 256  # the smallest VM
ROOT_ADDS = "run as root to have it looked at"

SPACES = {  # key: what it is for, MiB below which nothing works, MiB below which it becomes tight
    "state": ("state of sandboxes", 16, 64),
    "data": ("images and writable layers", 16, 1024),
    "cache": ("guest image", 16, 300),
}

OPTIONAL_DEVICES = {
    "/dev/vhost-vsock": ("vsock", "the agent is reached by a virtio-serial port instead"),
    "/dev/vhost-net": ("vhost-net", "QEMU moves network frames itself, which is slower"),
    "/dev/net/tun": ("tun", "sandboxes get no network"),
}

TRIALS = {  # key: title, whether nothing starts without it, what is lost, remedy
    "netns": ("network namespaces", True, "sandboxes with a network do not start", "a kernel with CONFIG_NET_NS"),
    "tap": ("tap devices", False, "sandboxes get no network", "modprobe tun"),
    "veth": ("veth pairs", False, "the built-in network cannot be made", "modprobe veth"),
    "ingress": ("tc: ingress qdisc", False, "pods get no network", "modprobe sch_ingress"),
    "redirect": ("tc: u32 and mirred", False, "pods get no network", "modprobe -a cls_u32 act_mirred"),
    "matchall": ("tc: matchall", False, "not used yet: u32 does the same", "modprobe cls_matchall"),
    "bpf": ("tc: bpf", False, "guests cannot be held to their addresses", "modprobe cls_bpf"),
    "htb": ("tc: htb", False, "rx_ and tx_rate_limiter_max_rate are refused", "modprobe sch_htb"),
    "bridge": ("bridges", False, "the built-in network cannot be made", "modprobe bridge"),
    "macvtap": ("macvtap", False, 'internetworking_model = "macvtap" does not work', "modprobe macvtap"),
}


def judge_machine(facts: CheckFacts) -> tuple[Line, ...]:
    kvm, *others = facts.devices
    return (
        judge_cpu(facts),
        judge_kvm_device(kvm, facts.cpu_vendor, root=facts.root),
        *judge_accelerators(facts),
        *(judge_device(device, root=facts.root) for device in others),
        judge_cgroup(facts),
        *judge_network(facts.trials),
        judge_cni(facts),
        judge_overlay(facts),
        judge_jail(facts),
        *(judge_space(key, space) for key, space in facts.spaces.items() if key in SPACES),
        judge_template_place(facts.spaces.get("templates")),
        judge_memory(facts),
        judge_capabilities(facts),
        judge_open_files(facts.open_files),
    )


def judge_cpu(facts: CheckFacts) -> Line:
    flag = VIRTUALISATION.get(facts.cpu_vendor, "")
    found = f"{facts.cpus} x {facts.cpu_vendor or 'unknown'}, {facts.architecture}"
    evidence = ("/proc/cpuinfo: vendor_id, flags",)
    if facts.architecture != ARCHITECTURE:
        return Line(
            "cpu",
            "CPU",
            Outcome.MISSING,
            found,
            effect="sandboxes are planned for x86_64 (QEMU's q35) only",
            remedy="use an x86_64 machine",
            evidence=evidence,
        )
    if flag and flag in facts.cpu_flags:
        return Line("cpu", "CPU", Outcome.OK, f"{found}, {flag}", evidence=evidence)
    if facts.accelerator.chosen == "kvm" and facts.accelerator.wanted == "auto":
        return Line("cpu", "CPU", Outcome.OK, f"{found}; KVM works without its flag", evidence=evidence)
    return Line(
        "cpu",
        "CPU",
        Outcome.LESS,
        f"{found}, without {flag or 'vmx or svm'}",
        effect=NO_KVM,
        remedy="switch on VT-x or AMD-V in the firmware; in a VM, nested virtualisation at its host",
        evidence=evidence,
    )


def _module_remedy(device: DeviceFacts) -> str:
    match device.module_state:
        case ModuleState.LOADABLE:
            return f"modprobe {device.module}; to keep it: echo {device.module} > /etc/modules-load.d/kata.conf"
        case ModuleState.ABSENT:
            return f"this kernel has no module {device.module}: install one that has"
        case ModuleState.LOADED:
            return f"{device.module} is loaded: give this machine or container the node {device.path}"


def _device_evidence(device: DeviceFacts) -> tuple[str, ...]:
    return (
        f"open {device.path}: {device.error or 'ok'}",
        f"module {device.module}: {device.module_state.value}",
    )


def judge_kvm_device(device: DeviceFacts, vendor: str, *, root: bool) -> Line:
    evidence = _device_evidence(device)
    if device.opens:
        return Line("kvm", "KVM device", Outcome.OK, f"{device.path} answers", evidence=evidence)
    if not root and "ermission" in device.error:
        remedy = f"{ROOT_ADDS}, or join the group of {device.path}"
        return Line("kvm", "KVM device", Outcome.UNKNOWN, f"{device.path}: {device.error}", remedy=remedy)
    module = {"GenuineIntel": "kvm_intel", "AuthenticAMD": "kvm_amd"}.get(vendor, "kvm_intel or kvm_amd")
    return Line(
        "kvm",
        "KVM device",
        Outcome.LESS,
        f"{device.path}: {device.error}",
        effect=NO_KVM,
        remedy=_module_remedy(device).replace(f"modprobe {device.module}", f"modprobe {module}"),
        evidence=evidence,
    )


def judge_device(device: DeviceFacts, *, root: bool) -> Line:
    evidence = _device_evidence(device)
    name, effect = OPTIONAL_DEVICES[device.path]
    if device.opens:
        return Line(f"device.{name}", name, Outcome.OK, f"{device.path} opens", evidence=evidence)
    if not root and "ermission" in device.error:
        return Line(f"device.{name}", name, Outcome.UNKNOWN, f"{device.path}: {device.error}", remedy=ROOT_ADDS)
    return Line(
        f"device.{name}",
        name,
        Outcome.LESS,
        f"{device.path}: {device.error}",
        effect=effect,
        remedy=_module_remedy(device),
        evidence=evidence,
    )


def judge_cgroup(facts: CheckFacts) -> Line:
    missing = [name for name in NEEDED_CONTROLLERS if name not in facts.cgroup_controllers]
    found = f"version {facts.cgroup_version}, controllers {' '.join(sorted(facts.cgroup_controllers)) or 'none'}"
    evidence = ("/proc/self/mountinfo",)
    if not facts.cgroup_version or missing:
        return Line(
            "cgroup",
            "cgroups",
            Outcome.LESS,
            found if facts.cgroup_version else "not mounted",
            effect=f"the host does not count and limit sandboxes: no {' and no '.join(missing)} controller",
            remedy="boot a host with cgroup v2 (systemd.unified_cgroup_hierarchy=1)",
            evidence=evidence,
        )
    if facts.root and not facts.cgroup_writable:
        return Line(
            "cgroup",
            "cgroups",
            Outcome.LESS,
            f"{found}, read-only",
            effect="sandboxes have no cgroup of their own on this host",
            remedy="in a container: give it a writable /sys/fs/cgroup",
            evidence=evidence,
        )
    return Line("cgroup", "cgroups", Outcome.OK, found, evidence=evidence)


def judge_network(trials: dict[str, Trial]) -> tuple[Line, ...]:
    """What was tried in a network namespace that went with the trial."""
    lines = []
    for key, (title, needed, effect, remedy) in TRIALS.items():
        trial = trials.get(key, Trial(None, "not tried"))
        evidence = ("tried in a network namespace of its own",) if trial.works is not None else ()
        if trial.works:
            lines.append(Line(f"net.{key}", title, Outcome.OK, "works", evidence=evidence))
        elif trial.works is None:
            lines.append(Line(f"net.{key}", title, Outcome.UNKNOWN, trial.said, remedy=ROOT_ADDS))
        else:
            outcome = Outcome.MISSING if needed else Outcome.NOTE if key == "matchall" else Outcome.LESS
            lines.append(Line(f"net.{key}", title, outcome, trial.said, effect, remedy, evidence))
    return tuple(lines)


def judge_cni(facts: CheckFacts) -> Line:
    absent = [name for name in (*BRIDGE_PLUGINS, *MORE_PLUGINS) if not facts.cni_plugins.get(name)]
    needed = [name for name in absent if name in BRIDGE_PLUGINS]
    evidence = (
        f"looked for in {' '.join(facts.cni_dirs)}",
        *(f"{name}: {path}" for name, path in facts.cni_plugins.items() if path),
    )
    networks = f"; networks: {', '.join(facts.cni_networks)}" if facts.cni_networks else ""
    if facts.cni_problems:
        found, remedy = "; ".join(facts.cni_problems), "correct or remove the file"
        return Line("cni", "CNI plugins", Outcome.LESS, found, "that network cannot be used", remedy, evidence)
    if absent:
        effect = "kata-runtime run has no network by default" if needed else "kata-runtime run -p is refused"
        remedy = install("containernetworking-plugins")
        return Line("cni", "CNI plugins", Outcome.LESS, f"no {', no '.join(absent)}", effect, remedy, evidence)
    directory = facts.cni_plugins[BRIDGE_PLUGINS[0]].rpartition("/")[0]
    return Line("cni", "CNI plugins", Outcome.OK, f"in {directory}{networks}", evidence=evidence)


def judge_overlay(facts: CheckFacts) -> Line:
    trial, data = facts.trials.get("overlay", Trial(None, "not tried")), facts.spaces.get("data")
    if data is not None and data.fs_type == "overlay":
        return Line(
            "overlay",
            "overlay",
            Outcome.MISSING,
            f"{data.path} lies on an overlay itself",
            effect="root file systems cannot be put together",
            remedy="mount a volume (ext4, xfs, tmpfs) on /var/lib/katapod",
        )
    if trial.works is None:
        return Line("overlay", "overlay", Outcome.UNKNOWN, trial.said, remedy=ROOT_ADDS)
    if not trial.works:
        effect = "directories and images that are not on a disk of the VM have no writable layer"
        remedy = "modprobe overlay; in a container give it CAP_SYS_ADMIN"
        return Line("overlay", "overlay", Outcome.MISSING, trial.said, effect, remedy)
    evidence = ("mounted on a tmpfs in a mount namespace of its own",)
    return Line(
        "overlay", "overlay", Outcome.OK, f"works; images lie on {data.fs_type}" if data else "works", "", "", evidence
    )


def judge_jail(facts: CheckFacts) -> Line:
    trial = facts.trials.get("jail", Trial(None, "not tried"))
    evidence = ("a program of this host stood in one, and /proc told what it is kept from",)
    if trial.works is None:
        return Line("jail", "jail", Outcome.UNKNOWN, trial.said, remedy=ROOT_ADDS)
    if not trial.works:
        remedy = "give Katapod the capabilities of root, and the user ids of jail_uids; see docs/how-to/security.md"
        return Line("jail", "jail", Outcome.MISSING, trial.said, "no VMM starts", remedy, evidence)
    found = "works: user of its own, no capability, empty root, own namespaces, system calls filtered"
    return Line("jail", "jail", Outcome.OK, found, evidence=evidence)


def judge_space(key: str, space: SpaceFacts) -> Line:
    purpose, floor_mib, tight_mib = SPACES[key]
    title = f"space: {key}"
    if space.error:
        remedy = "make the directory usable for root"
        return Line(f"space.{key}", title, Outcome.MISSING, f"{space.path}: {space.error}", "", remedy)
    found = f"{space.free_mib} MiB free in {space.path} ({space.fs_type})"
    evidence = (purpose,)
    remedy = f"free space in {space.path}: at least {tight_mib} MiB"
    if space.free_mib < floor_mib:
        return Line(f"space.{key}", title, Outcome.MISSING, found, f"no room for {purpose}", remedy, evidence)
    if space.free_mib < tight_mib:
        return Line(f"space.{key}", title, Outcome.LESS, found, f"little room for {purpose}", remedy, evidence)
    return Line(f"space.{key}", title, Outcome.OK, found, evidence=evidence)


def judge_template_place(space: SpaceFacts | None) -> Line:
    title = "templates"
    if space is None:
        return Line("templates", title, Outcome.NOTE, "off: enable_template = false")
    if space.error or space.fs_type != "tmpfs":
        return Line(
            "templates",
            title,
            Outcome.LESS,
            f"{space.path} is on {space.error or space.fs_type}",
            effect="templates are read from a disk: starts may be slower",
            remedy="set template_path in [factory] to a directory on a tmpfs",
        )
    return Line("templates", title, Outcome.OK, f"{space.path} is on tmpfs, {space.free_mib} MiB free")


def judge_memory(facts: CheckFacts) -> Line:
    wanted = facts.default_memory_mib
    found = f"{facts.mem_available_mib} of {facts.mem_mib} MiB available; a sandbox has up to {wanted} MiB by default"
    if facts.mem_available_mib < SMALL_MEMORY_MIB:
        effect, remedy = "the smallest sandbox does not fit", "free memory"
        return Line("memory", "memory", Outcome.MISSING, found, effect, remedy)
    if facts.mem_available_mib < wanted:
        effect = "a sandbox that uses its default size in full does not fit"
        return Line(
            "memory", "memory", Outcome.LESS, found, effect, "lower default_memory in [hypervisor.qemu], or use -m"
        )
    return Line("memory", "memory", Outcome.OK, found, evidence=("/proc/meminfo: MemTotal, MemAvailable",))


def judge_capabilities(facts: CheckFacts) -> Line:
    line_id, title = "capabilities", "capabilities"
    absent = [name for name in NEEDED_CAPABILITIES if name not in facts.capabilities]
    evidence = ("/proc/self/status: CapEff",)
    if not facts.root:
        found = "not root: sandboxes are started by root"
        return Line(line_id, title, Outcome.UNKNOWN, found, remedy=ROOT_ADDS, evidence=evidence)
    if absent:
        remedy = "in a container: run it with these capabilities"
        return Line(
            line_id, title, Outcome.MISSING, f"no {', no '.join(absent)}", "no sandbox starts", remedy, evidence
        )
    if "CAP_SYS_RESOURCE" not in facts.capabilities:
        return Line(
            line_id,
            title,
            Outcome.LESS,
            "root without CAP_SYS_RESOURCE",
            effect="limits of open files and processes cannot be raised above those of this shell",
            remedy="in a container: --cap-add SYS_RESOURCE; or raise the limits outside",
            evidence=evidence,
        )
    return Line(line_id, title, Outcome.OK, "all that are needed", evidence=evidence)


def judge_open_files(limit: int) -> Line:
    if limit < NOFILE_WANTED:
        return Line(
            "open-files",
            "open files",
            Outcome.LESS,
            f"at most {limit} for each process",
            effect="virtiofsd fails when a guest knows more files, open or cached (EMFILE)",
            remedy=f"raise it: ulimit -Hn {NOFILE_WANTED}; for a service LimitNOFILE={NOFILE_WANTED}",
        )
    return Line("open-files", "open files", Outcome.OK, f"at most {limit} for each process")
