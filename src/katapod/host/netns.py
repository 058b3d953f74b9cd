"""Network namespaces of pods: what is in them, NICs' taps made in them (taps.py), tc run in them.

A thread enters a namespace for what needs no program, and ends with it; programs enter it between fork and exec.
"""

import asyncio
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from katapod.host.own_mounts import in_host_mounts
from katapod.host.own_thread import in_own_thread
from katapod.host.process import ProcessFailed, find_program, run
from katapod.host.taps import close_all, delete_taps, open_macvtap, open_tap
from katapod.kernel.process import CLONE_NEWNET, setns
from katapod.model.errors import UsageError
from katapod.model.network import TAP_NAME, Interworking, NetworkError, NetworkRecord, PodNetworkFacts
from katapod.model.network_text import parse_pod_network
from katapod.plan.network import NicPlan, plan_undo
from katapod.tasks import finish

__all__ = [
    "attach_nic",
    "check_netns",
    "detach_nics",
    "detach_recorded",
    "hold_frames",
    "in_netns",
    "netns_inode",
    "open_vhost",
    "scan_netns",
]

log = logging.getLogger(__name__)

TOOL_LIMIT_S = 20.0
SCAN = b"addr show\nroute show table all\nneigh show\n"

_Result = TypeVar("_Result")


def netns_inode(path: Path) -> int:
    """What tells a network namespace from others; 0 if there is none at `path`."""
    try:
        return in_host_mounts(lambda: os.stat(path).st_ino)
    except OSError:
        return 0


def check_netns(path: Path) -> int:
    """The inode of a pod's network namespace. Raises NetworkError, UsageError for the host's own."""
    inode = netns_inode(path)
    if not inode:
        raise NetworkError(f"cannot use the network namespace {path}: there is none")
    if inode in (netns_inode(Path("/proc/1/ns/net")), netns_inode(Path("/proc/self/ns/net"))):
        raise UsageError(
            f"cannot use the network namespace {path}: it is the host's own, and a guest has a kernel, and so a "
            "network, of its own",
            hint="run the pod without hostNetwork (--net=host), or with another runtime",
        )
    return inode


def in_netns(path: Path, work: Callable[[], _Result]) -> _Result:
    """Run `work` in a thread of its own that has entered the namespace. Raises what it raises, and OSError."""

    def enter() -> _Result:
        fd = in_host_mounts(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        try:
            setns(fd, CLONE_NEWNET)
        finally:
            os.close(fd)
        return work()

    return in_own_thread(enter, name="in-netns")


async def scan_netns(path: Path) -> PodNetworkFacts:
    """The interfaces and routes that a guest is to have.

    Raises NetworkError, CannotRun, ProcessFailed, MissingProgram.
    """
    program = find_program("ip", package="iproute2")
    done = await run([program, "-json", "-details", "-batch", "-"], input=SCAN, netns=path, timeout_s=TOOL_LIMIT_S)
    parts = [line.encode() for line in done.stdout.splitlines() if line.startswith("[")]
    if len(parts) != 3:
        raise NetworkError(f"cannot read the network namespace {path}: ip(8) answered {len(parts)} of 3 questions")
    return parse_pod_network(*parts)


async def _tc(path: Path, lines: Sequence[str], *, force: bool = False) -> None:
    program = find_program("tc", package="iproute2")
    argv = [program, *(["-force"] if force else []), "-batch", "-"]
    text = "".join(f"{line}\n" for line in lines).encode()
    await run(argv, input=text, netns=path, timeout_s=TOOL_LIMIT_S, check=not force)


async def attach_nic(path: Path, plan: NicPlan) -> list[int]:
    """Make what stands between the interface and the guest's NIC; returns descriptors, the caller's to close: the tap's
    queues, or with an owner what keeps others away from it (taps.py).

    What a killed sandbox left in the namespace is taken away first. Raises NetworkError and those of scan_netns.
    """
    try:
        if plan.model is Interworking.MACVTAP:
            return await _attach_macvtap(path, plan)
        fds = await _opened_in(path, plan, open_tap)
    except OSError as exc:
        raise NetworkError(
            f"cannot attach the interface {plan.interface.name} in {path}: {plan.tap}: {exc.strerror or exc}"
            + ("; another sandbox uses it" if exc.errno == 16 else "")
        ) from exc
    redirected = False

    async def redirect() -> None:
        nonlocal redirected
        await _redirect(path, plan)
        redirected = True
        await hold_frames(path, plan)

    try:
        if plan.tc.steps or plan.hold:
            await finish(redirect(), name="redirect")  # else it is not known how far tc got
    except BaseException:
        if redirected:
            await finish(_tc(path, plan.tc.undo, force=True), name="undo-redirect")
        await finish(_close_tap(path, plan, fds), name="close-tap")
        raise
    return fds


async def _opened_in(path: Path, plan: NicPlan, work: Callable[[NicPlan], list[int]]) -> list[int]:
    """What `work` opens in the namespace. A thread cannot be cancelled: if we are, all that it opens is closed again.
    Raises OSError."""
    fds: list[int] = []
    try:
        await finish(asyncio.to_thread(lambda: fds.extend(in_netns(path, lambda: work(plan)))), name="open-tap")
    except BaseException:
        if fds:
            await finish(_close_tap(path, plan, fds), name="close-tap")
        raise
    return fds


async def _close_tap(path: Path, plan: NicPlan, fds: list[int]) -> None:
    """Take back what open_tap made. Raises OSError."""
    if plan.owner is not None and not plan.direct:
        await asyncio.to_thread(in_netns, path, lambda: delete_taps({plan.tap}))
    close_all(fds)


async def _redirect(path: Path, plan: NicPlan) -> None:
    """Set qdiscs and filters; once more if what was in the way was left by a sandbox that is gone."""
    if not plan.tc.steps:
        return
    try:
        await _tc(path, plan.tc.steps)
    except ProcessFailed as first:
        if not await _is_stale(path, plan.interface.name):
            raise _not_redirected(path, plan, first) from first
        clean = [*plan.tc.undo, f"qdisc del dev {plan.tap} ingress"]
        await _tc(path, clean, force=True)
        try:
            await _tc(path, plan.tc.steps)
        except BaseException as second:
            await _tc(path, clean, force=True)
            if isinstance(second, ProcessFailed):
                raise _not_redirected(path, plan, second) from second
            raise


async def hold_frames(path: Path, plan: NicPlan) -> None:
    """Set the filter that holds the guest to its addresses, if the plan has one. Raises NetworkError."""
    if not plan.hold:
        return
    try:
        await _tc(path, plan.hold)
    except ProcessFailed as exc:
        raise NetworkError(
            f"cannot hold the frames of {plan.interface.name} in {path} to its addresses: {exc.stderr.strip() or exc}",
            hint='load the modules cls_bpf and sch_ingress, or set spoof_check = "none" in [katapod]',
        ) from exc


def _not_redirected(path: Path, plan: NicPlan, cause: ProcessFailed) -> NetworkError:
    return NetworkError(
        f"cannot redirect the interface {plan.interface.name} in {path}: {cause.stderr.strip() or cause}",
        hint="something else has set an ingress qdisc on it",
    )


async def _is_stale(path: Path, interface: str) -> bool:
    """Whether the interface's ingress filters, all of them, lead to a tap of ours, which can only be a dead one:
    the living one of this name is held by us."""
    program = find_program("tc", package="iproute2")
    argv = [program, "-json", "filter", "show", "dev", interface, "ingress"]
    done = await run(argv, netns=path, timeout_s=TOOL_LIMIT_S, check=False)
    try:
        filters: list[dict[str, Any]] = json.loads(done.stdout or "[]")
        targets = [
            str(action.get("to_dev", "")) for entry in filters for action in entry.get("options", {}).get("actions", ())
        ]
    except (ValueError, AttributeError):
        return False
    return all(target in ("", "*") or TAP_NAME.fullmatch(target) for target in targets)


async def _attach_macvtap(path: Path, plan: NicPlan) -> list[int]:
    """The guest takes the MAC address over, so the interface gets another, and gives its addresses up."""
    program = find_program("ip", package="iproute2")
    name = plan.interface.name
    lines = [
        f"link add link {name} name {plan.tap} type macvtap mode bridge",
        f"addr flush dev {name}",
        f"link set dev {name} address 02:{os.urandom(5).hex(':')}",
        # allmulticast: nobody tells it of the groups that the guest listens to, IPv6's neighbour discovery among them
        f"link set dev {plan.tap} address {plan.interface.mac} mtu {plan.interface.mtu} allmulticast on up",
    ]
    try:
        await run([program, "-batch", "-"], input="\n".join(lines).encode(), netns=path, timeout_s=TOOL_LIMIT_S)
        await hold_frames(path, plan)
        return await _opened_in(path, plan, open_macvtap)
    except NetworkError:
        await detach_nics(path, NetworkRecord(str(path), netns_inode(path), (plan.record,)))
        raise
    except (ProcessFailed, OSError) as exc:
        await detach_nics(path, NetworkRecord(str(path), netns_inode(path), (plan.record,)))
        cause = exc.stderr.strip() if isinstance(exc, ProcessFailed) else exc.strerror
        raise NetworkError(f"cannot put a macvtap on {name} in {path}: {cause}") from exc


async def detach_nics(path: Path, record: NetworkRecord) -> None:
    """Undo what attach_nic made, once nobody holds the taps. Idempotent; a namespace that is gone has nothing left."""
    if netns_inode(path) != record.inode:
        return
    await asyncio.to_thread(in_netns, path, lambda: delete_taps({nic.tap for nic in record.nics}))
    lines = [line for nic in record.nics for line in plan_undo(nic)]
    if lines:
        await _tc(path, lines, force=True)
    await _give_back(path, record)


async def _give_back(path: Path, record: NetworkRecord) -> None:
    """MAC addresses and addresses to the interfaces that lent them."""
    lines = []
    for nic in record.nics:
        if nic.mac:
            lines.append(f"link set dev {nic.interface} address {nic.mac}")
            lines += [f"addr replace dev {nic.interface} {address}" for address in nic.addresses]
    if lines:
        program = find_program("ip", package="iproute2")
        text = "\n".join(lines).encode()
        await run([program, "-force", "-batch", "-"], input=text, netns=path, timeout_s=TOOL_LIMIT_S, check=False)


async def detach_recorded(record: NetworkRecord) -> None:
    """detach_nics from what is on disk. Raises KatapodError, OSError."""
    await detach_nics(Path(record.netns), record)


def open_vhost(queues: int) -> list[int]:
    """One /dev/vhost-net for each queue. Raises OSError."""
    fds: list[int] = []
    try:
        for _ in range(queues):
            fds.append(os.open("/dev/vhost-net", os.O_RDWR | os.O_CLOEXEC))
    except BaseException:
        close_all(fds)
        raise
    return fds
