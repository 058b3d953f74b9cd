"""What is made in a pod's network namespace, as values.

Source: tc(8), tc-u32(8), tc-mirred(8), tc-htb(8).
"""

from msgspec import Struct
from msgspec.structs import replace

from katapod.model.network import (
    IFA_F_DEPRECATED,
    IFA_F_NOPREFIXROUTE,
    Address,
    Interface,
    InterfaceKind,
    Interworking,
    NetworkError,
    NicRecord,
)
from katapod.plan.frames import bytecode, plan_held_frames

__all__ = [
    "DEFAULT_NETWORK",
    "NetworkSettings",
    "NicPlan",
    "TcPlan",
    "plan_hold",
    "plan_nic",
    "plan_redirect",
    "plan_undo",
    "render_address",
    "tap_name",
]

VIRTIO_QUEUES_MAX = 16  # a pod's NIC gains nothing from more


class NetworkSettings(Struct, frozen=True):
    """Rates in bit/s, 0 for none; they are the guest's: rx is what it receives.

    `tap_owner` is the user of a VMM that opens its taps by name, without a capability; None for one that is handed
    their descriptors.
    """

    model: Interworking = Interworking.TCFILTER
    vhost: bool = False  # the host has /dev/vhost-net, and it is wanted
    rx_rate: int = 0
    tx_rate: int = 0
    held: bool = False  # the guest's frames have to be from its own MAC address and addresses
    tap_owner: int | None = None


DEFAULT_NETWORK = NetworkSettings()


class TcPlan(Struct, frozen=True):
    """Lines for `tc -batch`. `undo` takes away what stays when the tap is gone."""

    steps: tuple[str, ...] = ()
    undo: tuple[str, ...] = ()


class NicPlan(Struct, frozen=True):
    """One interface of the pod and the guest's NIC in its place."""

    interface: Interface
    number: int
    tap: str
    model: Interworking
    direct: bool  # the interface is a tap itself, and is used as it is
    queues: int
    vhost: bool
    tc: TcPlan
    hold: tuple[str, ...] = ()  # lines for `tc -batch`: they can be repeated, and go with the tap
    owner: int | None = None  # the user who may open the tap by its name; None: descriptors of it are handed over

    @property
    def record(self) -> NicRecord:
        taken = self.model is Interworking.MACVTAP
        return NicRecord(
            self.interface.name,
            "" if self.direct else self.tap,
            self.model.value,
            mac=self.interface.mac if taken else "",
            addresses=tuple(render_address(address) for address in self.interface.addresses) if taken else (),
            shaped=any(step.endswith(" root") for step in self.tc.undo),
        )

    def describe(self) -> str:
        interface = f"{self.interface.name} ({self.interface.kind.value})"
        owner = "" if self.owner is None else f", opened by user {self.owner}"
        lines = [
            f"interface {interface} by {self.tap}, model {self.model.value}{owner}",
            *(f"  tc {step}" for step in (*self.tc.steps, *self.hold)),
        ]
        return "\n".join(lines)


def render_address(address: Address) -> str:
    """What `ip address replace` is told of an address, but for the interface. Source: ip-address(8)."""
    words = [f"{address.address} peer {address.peer}/{address.prefix}" if address.peer else str(address)]
    for name, value in (("broadcast", address.broadcast), ("label", address.label), ("scope", address.scope)):
        words += [f"{name} {value}"] if value else []
    words += [f"metric {address.metric}"] if address.metric else []
    words += ["noprefixroute"] if address.flags & IFA_F_NOPREFIXROUTE else []
    words += ["nodad"] if address.is_v6 else []  # it was there before, and the host has checked for duplicates already
    words += ["preferred_lft 0"] if address.flags & IFA_F_DEPRECATED else []
    return " ".join(words)


def tap_name(number: int) -> str:
    return f"tap{number}_kata"


def plan_redirect(source: str, target: str) -> TcPlan:
    """Every frame that comes in at `source` goes out at `target`. Raises ValueError if they are the same."""
    if source == target:
        raise ValueError(f"cannot redirect {source} to itself")
    action = f"action mirred egress redirect dev {target}"
    return TcPlan(
        (
            f"qdisc add dev {source} ingress",
            f"filter add dev {source} parent ffff: protocol all u32 match u8 0 0 {action}",
        ),
        (f"qdisc del dev {source} ingress",),
    )


def plan_hold(interface: Interface, tap: str, model: Interworking) -> tuple[str, ...]:
    """Drop what is not the guest's own, where its frames come in. Said again it replaces what was said before.

    Raises NetworkError for a tap that is the pod's own.
    """
    if interface.kind is InterfaceKind.TAP:
        raise NetworkError(
            f"cannot hold {interface.name} to its addresses: it is a tap of the pod's own",
            hint='set spoof_check = "run", and filter where the tap leads',
        )
    program = f"bpf da bytecode '{bytecode(plan_held_frames(interface.mac, interface.addresses))}'"
    rest = f"protocol all prio 1 handle 1 {program}"
    if model is Interworking.TCFILTER:
        return (f"filter replace dev {tap} parent ffff: {rest}",)
    way = "egress" if model is Interworking.MACVTAP else "ingress"  # a macvtap sends what the guest has sent
    return (f"qdisc replace dev {tap} clsact", f"filter replace dev {tap} {way} {rest}")


def _plan_rate(device: str, rate: int) -> TcPlan:
    """All that goes out at `device` shares `rate` bit/s."""
    return TcPlan(
        (
            f"qdisc add dev {device} root handle 1: htb default 2",
            f"class add dev {device} parent 1: classid 1:1 htb rate {rate}bit ceil {rate}bit",
            f"class add dev {device} parent 1:1 classid 1:2 htb rate {rate}bit ceil {rate}bit",
        ),
        (f"qdisc del dev {device} root",),
    )


def plan_nic(interface: Interface, number: int, settings: NetworkSettings, *, vcpus: int) -> NicPlan:
    """Raises NetworkError where the model does not go with the kind of interface, or with the VMM."""
    if settings.tap_owner is not None:
        _check_by_name(interface, settings)
        vcpus, settings = 1, replace(settings, vhost=False)  # its one vCPU serves one queue; vhost is by descriptor
    if interface.kind is InterfaceKind.IPVLAN and settings.model is Interworking.MACVTAP:
        # its parent knows it by its addresses, which a macvtap would take away, and its MAC address is the parent's
        raise NetworkError(
            f"cannot put a macvtap on {interface.name}: it is an ipvlan",
            hint='set internetworking_model = "tcfilter", or use macvlan',
        )
    if interface.kind is InterfaceKind.TAP and not settings.rx_rate and not settings.tx_rate:
        queues = vcpus if interface.multi_queue else 1
        name, direct, model, tc = interface.name, True, Interworking.NONE, TcPlan()
    elif interface.kind is InterfaceKind.TAP or (
        settings.model is not Interworking.TCFILTER and (settings.rx_rate or settings.tx_rate)
    ):
        raise NetworkError(
            f"cannot limit the rate of {interface.name}: only the model tcfilter, on an interface that is no tap, can",
            hint="set rx_rate_limiter_max_rate and tx_rate_limiter_max_rate to 0",
        )
    else:
        queues, name, direct, model = vcpus, tap_name(number), False, settings.model
        tc = _plan_tc(interface.name, name, settings)
    return NicPlan(
        interface,
        number,
        name,
        model,
        direct,
        max(1, min(queues, VIRTIO_QUEUES_MAX)),
        settings.vhost,
        tc,
        plan_hold(interface, name, model) if settings.held else (),
        settings.tap_owner,
    )


def _check_by_name(interface: Interface, settings: NetworkSettings) -> None:
    """Whether a VMM can open by name what this interface leads to. Raises NetworkError."""
    if interface.kind is InterfaceKind.TAP:
        if interface.multi_queue:
            raise NetworkError(
                f"cannot attach {interface.name}: it is a tap with several queues, and this VMM opens one",
                hint='make it without multi_queue, or set accelerator = "tcg"',
            )
    elif settings.model is Interworking.MACVTAP:
        raise NetworkError(
            f"cannot put a macvtap on {interface.name}: this VMM opens taps by their names only",
            hint='set internetworking_model = "tcfilter", or accelerator = "tcg"',
        )


def _plan_tc(interface: str, tap: str, settings: NetworkSettings) -> TcPlan:
    if settings.model is not Interworking.TCFILTER:
        return TcPlan()
    there, back = plan_redirect(interface, tap), plan_redirect(tap, interface)
    steps, undo = [*there.steps, *back.steps], [*there.undo]
    if settings.rx_rate:
        steps += _plan_rate(tap, settings.rx_rate).steps  # goes with the tap
    if settings.tx_rate:
        rate = _plan_rate(interface, settings.tx_rate)
        steps += rate.steps
        undo += rate.undo
    return TcPlan(tuple(steps), tuple(undo))


def plan_undo(record: NicRecord) -> tuple[str, ...]:
    """What to tell tc to take away of an interface whose tap is gone, from its record alone."""
    if record.model != Interworking.TCFILTER.value or not record.tap:
        return ()
    shaped = (f"qdisc del dev {record.interface} root",) if record.shaped else ()
    return (*plan_redirect(record.interface, record.tap).undo, *shaped)
