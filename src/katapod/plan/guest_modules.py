"""Which kernel modules a guest has, by its VMM. Pure data; plan.guest_image puts them in order."""

from collections.abc import Mapping

from msgspec import Struct

from katapod.model.flavour import GuestVmm

__all__ = ["GUEST_MODULES", "ON_DEMAND_DIRECTORIES", "ON_DEMAND_MODULES", "GuestModules"]


class GuestModules(Struct, frozen=True):
    """Names of modules; a kernel may have any of them built in."""

    early: tuple[str, ...]
    """Before the agent can answer: the port of the agent channel, and the bus that it is on."""
    late: tuple[str, ...]
    """Drivers of what may be plugged in. There is no udev in the guest, so nobody loads them on sight."""
    required: frozenset[str]
    hint: str  # which kernel has them
    left_out: frozenset[str] = frozenset()  # built in, and never started: vmm/uml/plan.py


ON_DEMAND_MODULES = (
    *("erofs", "squashfs", "isofs", "vfat", "loop", "nbd", "nls_utf8", "nls_ascii", "nls_cp437", "nls_iso8859_1"),
    *("binfmt_misc", "cuse", "ts_bm", "ts_kmp", "ts_fsm"),
    *("tun", "tap", "veth", "dummy", "ifb", "macvlan", "macvtap", "ipvlan", "ipvtap", "vxlan", "geneve", "vrf"),
    *(
        "nlmon",
        "wireguard",
        "bonding",
        "8021q",
        "ip_gre",
        "ip6_gre",
        "ipip",
        "sit",
        "ip6_tunnel",
        "ip_vti",
        "ip6_vti",
        "fou",
    ),
    *("esp4", "esp6", "ah4", "ah6", "xfrm_user", "xfrm_interface", "tls"),
    *("inet_diag", "tcp_diag", "udp_diag", "raw_diag", "unix_diag", "netlink_diag", "af_packet_diag"),
)
"""Only in the image, compressed: the guest's kernel calls modprobe for what a container asks of it and may have: a
file system to mount, a kind of network interface, a rule of the packet filter. Loading them always would cost each
sandbox memory and time for nothing. docs/how-to/guest-image.md says what is left out."""

ON_DEMAND_DIRECTORIES = (
    *("net/netfilter/", "net/ipv4/netfilter/", "net/ipv6/netfilter/", "net/bridge/", "net/sched/", "net/ipv4/tcp_"),
)
"""As ON_DEMAND_MODULES, by the beginning of their path: iptables and nftables with all matches and targets, IP sets,
IPVS, bridges, queueing disciplines, classifiers and actions, congestion control."""

_QEMU = GuestModules(
    early=("virtio_pci", "virtio_console"),
    # ext4 is the file system of root disks: a template has it loaded, so that no container waits for it.
    late=(
        *("virtiofs", "overlay", "vmw_vsock_virtio_transport", "virtio_rng", "virtio_blk", "ext4", "virtio_net"),
        *("virtio_balloon", "vmgenid"),
    ),
    required=frozenset({"virtio_pci", "virtio_console", "virtiofs", "overlay"}),
    hint="install a kernel with virtio and virtio-fs: apt install linux-image-cloud-amd64",
)

_UML = GuestModules(
    # overlay: its system disk is read-only. The bus, that disk's driver and those of NICs are built in.
    early=("overlay", "virtio_console"),
    late=("virtiofs", "virtio_blk", "ext4", "virtio_balloon", "ipv6"),  # nobody asks for ipv6 before addresses are set
    required=frozenset({"virtio_console", "virtiofs", "overlay"}),
    hint="install the distribution's User-mode Linux: apt install user-mode-linux",
    left_out=frozenset({"btrfs", "jfs", "xfs", "zswap"}),
)

GUEST_MODULES: Mapping[GuestVmm, GuestModules] = {"qemu": _QEMU, "uml": _UML}
