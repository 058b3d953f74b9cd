"""What is tried for real by `kata-runtime check`: in namespaces that have no name and go with their last descriptor.

However this process ends, nothing is left: an interface lives in its network namespace, a mount in its mount namespace.
"""

import contextlib
import os
import shlex
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from katapod.host.jail import Program, running_in_jail
from katapod.host.jail_uids import held_uid
from katapod.host.own_thread import in_own_thread
from katapod.host.process import run
from katapod.kernel.mount import mount
from katapod.kernel.process import CLONE_FS, CLONE_NEWNET, CLONE_NEWNS, unshare
from katapod.model.errors import KatapodError
from katapod.model.layout import UIDS_LOCK
from katapod.model.uid_range import UidRange
from katapod.observe.check_facts import Trial
from katapod.observe.confinement import confinement_of
from katapod.plan.call_filter import CallFilter
from katapod.plan.frames import bytecode, plan_held_frames
from katapod.plan.jail import Access, Bind, JailPlan
from katapod.plan.network import plan_redirect

__all__ = ["try_jail", "try_network", "try_overlay"]

LIMIT_S = 10.0
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
PROGRAM_IN_JAIL = "/program"
MS_REC, MS_PRIVATE = 0x4000, 0x40000

_PROGRAM = f"'{bytecode(plan_held_frames('02:00:00:00:00:01', ()))}'"
_QDISC, _FILTER = plan_redirect("eth0", "tap0_kata").steps
STEPS = (  # key, program, arguments, steps that it builds on. The redirection is the one of a pod
    ("tap", "ip", "tuntap add dev tap0_kata mode tap vnet_hdr", ()),
    ("veth", "ip", "link add eth0 type veth peer name peer0", ()),
    ("ingress", "tc", _QDISC, ("veth",)),
    ("redirect", "tc", _FILTER, ("ingress", "tap")),
    (
        "matchall",
        "tc",
        "filter add dev eth0 parent ffff: matchall action mirred egress redirect dev tap0_kata",
        ("ingress", "tap"),
    ),
    ("bpf", "tc", f"filter add dev eth0 parent ffff: protocol all prio 1 bpf da bytecode {_PROGRAM}", ("ingress",)),
    ("htb", "tc", "qdisc add dev eth0 root handle 1: htb default 2", ("veth",)),
    ("bridge", "ip", "link add cni0 type bridge", ()),
    ("macvtap", "ip", "link add link eth0 name macvtap0 type macvtap mode bridge", ("veth",)),
)


def _new_netns() -> int:
    """The descriptor of a network namespace that nobody else has. Raises OSError."""

    def enter() -> int:
        unshare(CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    return in_own_thread(enter, name="new-netns")


@contextlib.asynccontextmanager
async def _scratch_netns() -> AsyncIterator[Path]:
    fd = _new_netns()
    try:
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


async def try_network() -> dict[str, Trial]:
    """Each kind of interface and each feature of tc that sandboxes need, by key."""
    keys = ("netns", *(key for key, *_ in STEPS))
    if os.geteuid() != 0:
        return dict.fromkeys(keys, Trial(None, "not tried: needs root"))
    trials: dict[str, Trial] = {}
    try:
        async with _scratch_netns() as netns:
            trials["netns"] = Trial(True)
            for key, name, arguments, needs in STEPS:
                trials[key] = await _try(netns, name, arguments, [trials[need] for need in needs])
    except OSError as exc:
        failed = Trial(False, f"cannot make one: {exc.strerror}")
        return {"netns": failed, **dict.fromkeys(keys[1:], Trial(None, "not tried: no network namespace"))}
    return trials


async def _try(netns: Path, name: str, arguments: str, needs: list[Trial]) -> Trial:
    if not all(need.works for need in needs):
        return Trial(None, "not tried: what it builds on does not work")
    program = shutil.which(name)
    if program is None:
        return Trial(None, f"not tried: {name} is not installed")
    try:
        done = await run([program, *shlex.split(arguments)], netns=netns, timeout_s=LIMIT_S, check=False)
    except KatapodError as exc:
        return Trial(False, str(exc))
    if done.returncode == 0:
        return Trial(True)
    said = next((line for line in done.stderr.splitlines() if line.strip()), "no word why")
    return Trial(False, said.strip())


async def try_jail(uids: UidRange) -> Trial:
    """Have a program of the host's stand still in a jail, and ask the kernel what it is kept from."""
    if os.geteuid() != 0:
        return Trial(None, "not tried: needs root")
    program = shutil.which("sleep")
    if program is None:
        return Trial(None, "not tried: sleep is not installed")
    binds = [Bind(Path(each).resolve(), each, Access.EXECUTE) for each in LIBRARIES if Path(each).is_dir()]
    binds.append(Bind(Path(program).resolve(), PROGRAM_IN_JAIL, Access.EXECUTE))
    output = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    try:
        with held_uid(uids, UIDS_LOCK) as uid:
            plan = JailPlan(uid, tuple(binds), calls=CallFilter((), refused=(("ptrace", 101),)))
            command = Program(PROGRAM_IN_JAIL, ("sleep", str(int(LIMIT_S))), {})
            async with running_in_jail(plan, command, output=output, soft=False) as child:
                kept = confinement_of(child.pid)
    except (KatapodError, OSError) as exc:
        return Trial(False, str(exc))
    finally:
        os.close(output)
    if kept is None:
        return Trial(False, "what is in it ends at once")
    lacks = sorted({"cgroup", "ipc", "mnt", "net", "pid", "uts"} - set(kept.namespaces))
    if kept.capabilities or not kept.no_new_privileges or not kept.seccomp or lacks:
        return Trial(False, f"it does not hold: {kept}")
    return Trial(True)


def try_overlay() -> Trial:
    """Mount an overlay, in a mount namespace of its own, on a tmpfs of its own over /tmp."""
    if os.geteuid() != 0:
        return Trial(None, "not tried: needs root")

    def work() -> None:
        unshare(CLONE_FS | CLONE_NEWNS)
        mount("none", "/", None, MS_REC | MS_PRIVATE)
        mount("tmpfs", "/tmp", "tmpfs", 0, "size=1m")  # noqa: S108 - ours alone, in this namespace
        for name in ("lower", "upper", "work", "merged"):
            os.mkdir(f"/tmp/{name}")  # noqa: S108
        data = "lowerdir=/tmp/lower,upperdir=/tmp/upper,workdir=/tmp/work"
        mount("overlay", "/tmp/merged", "overlay", 0, data)  # noqa: S108

    try:
        in_own_thread(work, name="try-overlay")
    except OSError as exc:
        return Trial(False, f"cannot mount one: {exc.strerror}")
    return Trial(True)
