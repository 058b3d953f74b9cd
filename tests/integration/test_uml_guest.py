"""The guest image for User-mode Linux: its agent is reached over the console's port, and runs a container."""

import asyncio
import contextlib
import os
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from katapod.host.regset import preload
from katapod.model.flavour import initrd_link, kernel_link
from katapod.osbuilder.uml_proof import plan_boot
from katapod.plan.container_spec import ContainerOptions, ProcessDefaults, plan_container_spec
from katapod.plan.guest_spec import strip_for_guest
from katapod.rpc.agent import AgentClient
from katapod.rpc.client import TtrpcClient
from katapod.rpc.oci_message import spec_to_message
from katapod.rpc.pb import agent_pb2
from katapod.vmm.spec import AGENT_PORT_NAME
from katapod.vmm.uml.console_device import CONSOLE_ID, serving_console

CACHE = Path("/var/cache/kata-containers")
KERNEL, DISK = CACHE / kernel_link("agent", "uml"), CACHE / initrd_link("agent", "uml")
ROOTFS = "/run/root-of-c1"

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not DISK.exists(), reason="needs a guest image for User-mode Linux: kata-runtime image build"),
    pytest.mark.asyncio(loop_scope="module"),
]


@dataclass
class Guest:
    agent: AgentClient
    process: asyncio.subprocess.Process


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest() -> AsyncIterator[Guest]:
    """A guest with a console and nothing else, whose agent has answered."""
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm", prefix="katapod-test-")))
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(directory / "console"))
        listener.listen(1)
        ours, theirs = socket.socketpair()
        await stack.enter_async_context(serving_console(listener, {AGENT_PORT_NAME: theirs}))
        device = f"virtio_uml.device={directory / 'console'}:{CONSOLE_ID}"
        process = await asyncio.create_subprocess_exec(
            *plan_boot(KERNEL, DISK, directory, device),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env={"HOME": str(directory), "TMPDIR": str(directory), **preload()},
            start_new_session=True,
        )
        assert process.stdout is not None
        console = asyncio.create_task(process.stdout.read())

        async def end() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            print((await console).decode(errors="replace"))

        stack.push_async_callback(end)
        ours.setblocking(False)
        agent = AgentClient(await TtrpcClient.on_socket(ours, "the agent"))
        stack.callback(agent.connection.close)
        await agent.check(timeout_s=30)
        await agent.call("CreateSandbox", agent_pb2.CreateSandboxRequest(sandbox_id="s1", hostname="guest"))
        yield Guest(agent, process)


async def run(guest: Guest, script: str, *, options: ContainerOptions | None = None) -> tuple[int, str]:
    """A container whose root file system is the guest's own, below a layer of the container's."""
    options = options or ContainerOptions(args=("/bin/sh", "-c", script))
    spec = plan_container_spec(ProcessDefaults(env=("PATH=/bin:/usr/bin:/usr/sbin",)), options, ROOTFS)
    storage = agent_pb2.Storage(
        driver="overlayfs",
        fstype="overlay",
        options=["lowerdir=/", "io.katacontainers.fs-opt.overlay-rw"],
        mount_point=ROOTFS,
    )
    request = agent_pb2.CreateContainerRequest(
        container_id="c1",
        exec_id="c1",
        OCI=spec_to_message(strip_for_guest(spec, root_path=ROOTFS, mount_sources={}, guest_seccomp=True)),
        storages=[storage],
    )
    agent = guest.agent
    await agent.call("CreateContainer", request)
    try:
        await agent.call("StartContainer", agent_pb2.StartContainerRequest(container_id="c1"))
        said = b""
        while chunk := await agent.read_stream("ReadStdout", "c1", "c1", 65536):
            said += chunk
        errors = b""
        while chunk := await agent.read_stream("ReadStderr", "c1", "c1", 65536):
            errors += chunk
        print(errors.decode())
        return await agent.wait_process("c1", "c1"), said.decode()
    finally:
        await agent.call("RemoveContainer", agent_pb2.RemoveContainerRequest(container_id="c1", timeout=10))


async def test_a_container_runs_on_the_kernel_of_the_image(guest: Guest) -> None:
    code, said = await run(guest, "uname -r; echo written > /file && cat /file; cat /proc/self/cgroup; exit 7")

    version = KERNEL.resolve().parent.name.partition("+")[0]
    assert (code, said.split()[:2]) == (7, [version, "written"])
    assert await run(guest, "ls /file") == (1, "")


async def test_the_root_can_be_written_to_and_the_disk_stays_as_it_is(guest: Guest) -> None:
    before = DISK.stat().st_mtime_ns

    code, said = await run(guest, "mount; cat /proc/cmdline")

    assert code == 0
    assert "ubd0r=" in said
    assert DISK.stat().st_mtime_ns == before


async def test_a_container_has_limits(guest: Guest) -> None:
    options = ContainerOptions(
        args=("/bin/sh", "-c", "cd /sys/fs/cgroup && cat memory.max pids.max cpu.max"),
        memory_bytes=64 << 20,
        pids_limit=50,
        cpus=0.5,
    )

    assert await run(guest, "", options=options) == (0, "67108864\n50\n50000 100000\n")


async def test_ipv6_is_there_and_devices_come_without_a_helper(guest: Guest) -> None:
    code, said = await run(guest, "test -e /proc/net/if_inet6 && echo ipv6; cat /sys/kernel/uevent_helper | wc -w")

    assert (code, said) == (0, "ipv6\n0\n")


async def test_modules_are_loaded_when_a_container_asks_for_them(guest: Guest) -> None:
    script = (
        "grep -c dummy /proc/modules; ip link add d0 type dummy && ip link set d0 up && ip link show d0;"
        "iptables-save 2>/dev/null; grep -o '^dummy' /proc/modules"
    )
    options = ContainerOptions(args=("/bin/sh", "-c", script), cap_add=("CAP_NET_ADMIN",))

    code, said = await run(guest, "", options=options)

    assert (code, said.splitlines()[0], said.splitlines()[-1]) == (0, "0", "dummy")
    assert "UP" in said


async def test_the_agent_tells_of_the_guest(guest: Guest) -> None:
    metrics = (await guest.agent.call("GetMetrics", agent_pb2.GetMetricsRequest())).metrics
    details = await guest.agent.call("GetGuestDetails", agent_pb2.GuestDetailsRequest(mem_block_size=True))
    inspected = await guest.agent.inspect(10.0)
    here_ns = time.time_ns()
    there_ns = await guest.agent.clock(timeout_s=60.0)

    assert "kata_guest_meminfo" in metrics
    assert details.agent_details.init_daemon
    assert inspected.ByteSize() > 0
    assert abs(there_ns - here_ns) < 10 * 10**9
