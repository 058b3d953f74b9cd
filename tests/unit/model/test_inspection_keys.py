"""The keys of `inspect --json`: programs rely on them, so they stay."""

import msgspec

from katapod.model import inspection as facts

KEYS: dict[type[msgspec.Struct], str] = {
    facts.SandboxFacts: "version sandbox_id state taken_at created_at error labels accelerator template vcpus "
    "memory_mib containers processes cgroups command_line kernel_parameters devices hypervisor network share channel "
    "guest files missing",
    facts.ContainerFacts: "container_id name image command state started_at finished_at exit_code oom_killed error",
    facts.Process: "pid parent role command state user rss cpu_seconds threads confinement",
    facts.Confinement: "capabilities no_new_privileges seccomp namespaces",
    facts.RecordedDevice: "kind name slot host backing read_only size_mib guest_path in_vmm",
    facts.OptionPart: "part meaning known details",
    facts.Hypervisor: "version status accelerator cpus base_memory plugged_memory balloon devices disks name",
    facts.Device: "device_id driver what origin pci guest_path",
    facts.Disk: "device_id file backing form read_only size read_bytes written_bytes guest_path guest_mount",
    facts.NetworkFacts: "netns inode members links nics redirects qdiscs routes nft",
    facts.Link: "name index kind peer_index mac mtu up master addresses counters",
    facts.Counters: "rx_bytes rx_packets tx_bytes tx_packets rx_dropped tx_dropped",
    facts.Nic: "interface tap model peer peer_where",
    facts.Redirect: "source target kind match bytes packets dropped",
    facts.ShareFacts: "tag directory guest socket virtiofsd mounts",
    facts.SharedMount: "name host fstype read_only guest container destination",
    facts.Channel: "kind address",
    facts.GuestFacts: "kernel kernel_build kernel_parameters agent init hostname uptime_s cpus memory_total "
    "memory_free memory_available modules mounts processes units links routes cut",
    facts.GuestProcess: "pid parent command state rss container",
    facts.GuestMount: "source target fstype options",
    facts.KernelModule: "name size used",
    facts.Unit: "name load active sub what",
    facts.GuestLink: "name mac mtu up addresses counters",
    facts.GuestRoute: "destination gateway device source",
    facts.Missing: "part why",
}


def test_keys() -> None:
    for kind, keys in KEYS.items():
        assert [field.encode_name for field in msgspec.structs.fields(kind)] == keys.split(), kind.__name__
    assert facts.FACTS_VERSION == 1


def test_all_keys_are_there_also_when_nothing_is_known() -> None:
    shown = msgspec.to_builtins(facts.SandboxFacts(sandbox_id="s", state="stopped", taken_at=1.0))
    assert set(shown) == set(KEYS[facts.SandboxFacts].split())
    assert shown["guest"] is None
