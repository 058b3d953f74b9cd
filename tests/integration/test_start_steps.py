"""Each step of a pod's start fails once: an error that says so, and nothing is left of the start.

They are run by what `auto` takes, some by QEMU as well, and those that only QEMU has by that.

What is broken from outside (a file, a program, the namespace's contents, a guest that refuses) shows the error that a
user gets; it has to name the step and its subject. Where no outside cause can be made, or not at that moment, the step
itself fails after it has done its work, which is the hardest moment for who cleans up. All else is real: the pod of
containerd's shim, its network namespace, a VM, the agent, crun.

The steps are those of sandbox/: pod.py, lifecycle.py, machine.py and container.py, in their order.
"""

import asyncio
import contextlib
import inspect
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from netns_helper import Pod as Wired
from netns_helper import inside, links, pod, qdiscs
from vm_helper import needs_guest_image, needs_vm, resources, settled

from katapod.host.state import StateStore
from katapod.model.config import check_paths, load_config
from katapod.model.errors import KatapodError, MissingProgram
from katapod.model.ids import ContainerId
from katapod.model.sizing import ContainerLimits
from katapod.observe import management_server
from katapod.plan.container_spec import ContainerOptions, ProcessDefaults, plan_container_spec
from katapod.rpc.agent import AgentClient
from katapod.sandbox import container, lifecycle, machine, opening, share
from katapod.sandbox.container import ContainerPlan, Rootfs
from katapod.sandbox.opening import open_sandbox
from katapod.sandbox.pod import Pod
from katapod.sandbox.recovery import find_leftovers
from katapod.sandbox.request import SandboxRequest
from katapod.sandbox.stdio import NullSink
from katapod.vmm.qemu import vmm as qemu
from katapod.vmm.qemu.process import QemuProcess
from katapod.vmm.qemu.qmp import QmpClient
from kit.accel import current_accelerator
from kit.jail_probe import script_for_jail
from kit.library import layout_below

pytestmark = [
    *needs_vm,
    needs_guest_image,
    pytest.mark.usefixtures("guest_image"),
]

CGROUPS = Path("/sys/fs/cgroup")
LIMITS = ContainerLimits(memory_bytes=300 << 20)  # more than the guest is born with: memory is plugged


@dataclass
class Start:
    """What a start is given, for a row of the table to spoil."""

    sandbox_id: str
    store: StateStore
    wired: Wired
    root: Path
    scratch: Path
    args: tuple[str, ...] = ("true",)
    netns: str = ""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def setting(self, table: str, **keys: Any) -> None:
        self.settings.setdefault(table, {}).update(keys)

    def cold(self) -> None:
        self.setting("factory", enable_template=False)

    def program(self, body: str) -> str:
        path = self.scratch / "program"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return str(path)

    def config_file(self) -> Path:
        path = self.scratch / "configuration.toml"
        names = {"qemu": "hypervisor.qemu", "agent": "agent.kata"}
        lines = []
        for table, keys in self.settings.items():
            lines.append(f"[{names.get(table, table)}]")
            lines += [
                f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
                for key, value in keys.items()
            ]
        path.write_text("\n".join(lines) + "\n")
        return path

    async def run(self) -> None:
        """All steps in their order, to the end of a container that ends by itself."""
        config = check_paths(load_config(self.config_file()), os.path.exists)
        request = SandboxRequest(
            ContainerId(self.sandbox_id), "guest", limits=LIMITS, netns=self.netns or str(self.wired.path),
            cgroups_path=f"/{self.sandbox_id}/c1", shm_size_bytes=16 << 20, accelerator=current_accelerator(),
        )  # fmt: skip
        opened = await open_sandbox(request, config, self.store, servers=(management_server.management_server,))
        try:
            await self._container(opened)
        finally:
            await opened.close()

    async def _container(self, opened: Pod) -> None:
        options = ContainerOptions(args=self.args, **self.options)
        spec = plan_container_spec(ProcessDefaults(env=("PATH=/bin",)), options, str(self.root))
        plan = ContainerPlan(container_id="c1", image="tree", spec=spec, rootfs=Rootfs(self.root))
        made = await opened.create_container(plan, LIMITS)
        await made.start()
        assert await made.carry(None, NullSink(), NullSink()) == 0
        await opened.remove_container("c1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system of busybox alone."""
    found = tmp_path_factory.mktemp("rootfs")
    for name in ("bin", "proc", "sys", "dev", "tmp", "etc"):
        (found / name).mkdir()
    shutil.copy(shutil.which("busybox") or "/bin/busybox", found / "bin" / "busybox")
    for name in ("sh", "true"):
        (found / "bin" / name).symlink_to("busybox")
    return found


@pytest.fixture(scope="module")
def wired() -> Iterator[Wired]:
    with pod("steps") as made:
        made.plug("eth0", 12)
        yield made


def all_of_it(start: Start) -> list[str]:
    """What is there of a start, and of what it has changed."""
    found = find_leftovers(start.store.layout, start.sandbox_id)
    # os.walk, unlike glob, passes over what goes away meanwhile
    found += [
        f"cgroup {folder}/{child}"
        for folder, children, _ in os.walk(CGROUPS)
        for child in children
        if start.sandbox_id in child
    ]
    with contextlib.suppress(OSError):
        found += [f"state {name}" for name in os.listdir(start.store.layout.state_root) if start.sandbox_id in name]
    return found + links(start.wired.netns) + qdiscs(start.wired.netns)


@pytest.fixture
async def start(store: StateStore, wired: Wired, root: Path, tmp_path: Path) -> AsyncIterator[Start]:
    found = Start(f"steps-{uuid.uuid4().hex[:8]}", store, wired, root, tmp_path)
    before, held = all_of_it(found), resources()
    yield found
    found.undo.close()
    assert await settled(lambda: all_of_it(found) == before), all_of_it(found)
    await asyncio.sleep(0.05)  # transports are closed a turn of the loop later
    assert resources() == held


@pytest.mark.core
async def test_nothing_is_broken(start: Start) -> None:
    """Else the table would show nothing."""
    await start.run()


# What is broken from outside


def no_state(start: Start) -> None:
    layout = layout_below(start.scratch)
    layout.state_root.write_text("a file")
    start.store = StateStore(layout)


def no_share(start: Start) -> None:
    start.store.layout.share_root.parent.mkdir(exist_ok=True)
    layout = layout_below(start.scratch)
    layout.share_root.write_text("a file")
    start.store = StateStore(layout)


def no_netns(start: Start) -> None:
    start.netns = "/run/netns/no-such-namespace"


HOLDER = """
import fcntl, os, struct, time
fd = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"tap0_kata", 0x5002))
os.system("ip link set tap0_kata up")
print("held", flush=True)
time.sleep(1000)
"""


def taken_tap(start: Start) -> None:
    holder = subprocess.Popen(
        ["nsenter", f"--net={start.wired.path}", sys.executable, "-c", HOLDER], stdout=subprocess.PIPE
    )
    start.undo.callback(holder.__exit__, None, None, None)
    start.undo.callback(holder.kill)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"


def taken_ingress(start: Start) -> None:
    inside(start.wired.netns, "tc", "qdisc", "add", "dev", "eth0", "clsact")
    start.undo.callback(inside, start.wired.netns, "tc", "qdisc", "del", "dev", "eth0", "clsact")


def no_virtiofsd(start: Start) -> None:
    start.cold()
    start.setting("qemu", virtio_fs_daemon=start.program("echo too old >&2; exit 3"))


def no_qemu(start: Start) -> None:
    start.cold()
    program = script_for_jail(start.scratch / "odd", "echo no such machine >&2; exit 4")
    start.setting("qemu", path=str(program))


def no_boot(start: Start) -> None:
    initrd = start.scratch / "initrd"
    initrd.write_bytes(b"no archive" * 1000)
    start.cold()
    start.setting("qemu", initrd=str(initrd))


def no_answer(start: Start) -> None:
    start.cold()
    start.setting("agent", dial_timeout=1)


def no_module(start: Start) -> None:
    start.cold()
    start.setting("agent", kernel_modules=["no_such_module"])


def no_root(start: Start) -> None:
    start.root = Path("/no/such/root")


def no_command(start: Start) -> None:
    start.args = ("/no/such/command",)


BROKEN: dict[str, tuple[Callable[[Start], None], list[str]]] = {
    "state": (no_state, ["cannot write", "{scratch}/sbs"]),
    "network namespace": (no_netns, ["network namespace", "/run/netns/no-such-namespace"]),
    "tap": (taken_tap, ["cannot attach the interface eth0", "tap0_kata"]),
    "redirection": (taken_ingress, ["cannot redirect the interface eth0"]),
    "share": (no_share, ["cannot make", "{scratch}/share"]),
    "virtiofsd": (no_virtiofsd, ["virtiofsd ended", "exit status 3", "too old"]),
    "QEMU": (no_qemu, ["cannot start QEMU", "exit status 4", "no such machine"]),
    "boot": (no_boot, ["the guest does not boot", "{scratch}/initrd"]),
    "agent": (no_answer, ["agent did not answer within 1 s"]),
    "CreateSandbox": (no_module, ["no_such_module"]),
    "root file system": (no_root, ["/no/such/root"]),
    "CreateContainer": (no_command, ["/no/such/command"]),
}


OF_QEMU = ("QEMU", "boot", "agent")
"""What other VMMs have not, or in another way."""


@pytest.mark.parametrize("step", [step for step in BROKEN if step not in OF_QEMU])
async def test_a_step_that_is_broken_from_outside(start: Start, step: str) -> None:
    await expect_words(start, step)


@pytest.mark.qemu("steps of QEMU's machines")
@pytest.mark.parametrize("step", OF_QEMU)
async def test_a_step_of_qemu_that_is_broken_from_outside(start: Start, step: str) -> None:
    await expect_words(start, step)


async def expect_words(start: Start, step: str) -> None:
    spoil, words = BROKEN[step]
    spoil(start)
    with pytest.raises((KatapodError, MissingProgram)) as caught:
        await start.run()
    print(caught.value)
    for word in words:
        assert word.format(scratch=start.scratch) in str(caught.value)


# What fails by itself


class Injected(KatapodError):
    """The failure of a step."""


STEPS: dict[str, tuple[Any, str]] = {
    "record": (StateStore, "write"),
    "accelerator": (opening, "accelerator_for"),
    "plan": (opening, "plan_sandbox"),
    "share": (lifecycle, "export_directory"),
    "cgroup": (machine, "joined_cgroup"),
    "channel": (machine, "claim_channel"),
    "network": (machine, "attach_network"),
    "virtiofsd": (share, "running_virtiofsd"),
    "agent": (machine, "connect_agent"),
    "clock": (machine, "set_clock"),
    "CreateSandbox": (machine, "_create_sandbox"),
    "control socket": (opening, "control_socket"),
    "management socket": (management_server, "management_server"),
    "loopback": (opening, "serving_loopback"),
    "root file system": (container, "open_rootfs"),
    "files of the container": (container, "prepare_host_files"),
}
QEMU_STEPS: dict[str, tuple[Any, str]] = {
    "template": (machine, "open_template"),
    "guest memory": (machine, "copy_memory"),
    "QEMU": (qemu, "running_qemu"),
    "device state": (QemuProcess, "load_state"),
    "devices": (QmpClient, "plug"),
    "first instruction": (QemuProcess, "run"),
    "wake": (machine, "reseed"),
    "plugged memory": (machine, "until_plugged"),
}
CORE_CALLS = ("UpdateRoutes", "StartContainer")
CALLS = ("CreateSandbox", "UpdateInterface", "CreateContainer", "RemoveContainer")


@dataclass(frozen=True)
class FailingEntry:
    """A context manager that is entered, and fails then."""

    manager: Any
    step: str

    async def __aenter__(self) -> None:
        async with self.manager:
            raise Injected(f"{self.step} fails on purpose")

    async def __aexit__(self, *exc: object) -> None:
        """Never entered."""


def failing(real: Any, step: str) -> Any:
    """`real` that does its work and fails then: a function, a coroutine, or the entering of a context manager."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        if inspect.isawaitable(result):
            return awaited(result)
        if hasattr(result, "__aenter__"):
            return FailingEntry(result, step)
        raise Injected(f"{step} fails on purpose")

    async def awaited(result: Any) -> Any:
        await result
        raise Injected(f"{step} fails on purpose")

    return call


@pytest.mark.parametrize("step", STEPS)
async def test_a_step_that_fails_after_its_work(start: Start, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await expect_failure(start, step, *STEPS[step], monkeypatch)


@pytest.mark.qemu("steps of QEMU's machines")
@pytest.mark.parametrize("step", QEMU_STEPS)
async def test_a_step_of_qemu_that_fails_after_its_work(
    start: Start, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await expect_failure(start, step, *QEMU_STEPS[step], monkeypatch)


async def expect_failure(start: Start, step: str, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), step))
    with pytest.raises(Injected, match=f"{step} fails on purpose"):
        await start.run()


@pytest.mark.parametrize("method", CALLS)
async def test_a_call_of_the_agent_that_fails_after_its_work(
    start: Start, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await expect_failed_call(start, method, monkeypatch)


@pytest.mark.core
@pytest.mark.parametrize("method", CORE_CALLS)
async def test_a_call_of_any_agent_that_fails_after_its_work(
    start: Start, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await expect_failed_call(start, method, monkeypatch)


async def expect_failed_call(start: Start, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = AgentClient.call

    async def call(self: AgentClient, called: str, *args: Any, **kwargs: Any) -> Any:
        answer = await real(self, called, *args, **kwargs)
        if called == method:
            raise Injected(f"{method} fails on purpose")
        return answer

    monkeypatch.setattr(AgentClient, "call", call)
    with pytest.raises(Injected, match=f"{method} fails on purpose"):
        await start.run()
