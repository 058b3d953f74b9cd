"""A pod's life by the calls that CRI-O makes, over the shim's own socket: docs/how-to/crio.md says what was tried by
hand with CRI-O itself."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from katapod.rpc.status import RpcError, StatusCode
from katapod.shim.pb import metrics_v1_pb2, metrics_v2_pb2, task_pb2
from kit.containerd import CGROUPS
from kit.crio import PAUSE, Crio, CrioContainer
from kit.kata import RUN_PREFIX, wait_for
from kit.pod_network import open_netns

LIVES = "trap 'echo bye; exit 9' TERM; echo up; while :; do echo tick; sleep 0.3; done"


@pytest.fixture
async def crio(tmp_path: Path) -> AsyncIterator[Crio]:
    name = f"{RUN_PREFIX}crio"
    parents = [hierarchy / name for hierarchy in CGROUPS.iterdir() if hierarchy.is_dir() and not hierarchy.is_symlink()]
    with open_netns(name), contextlib.ExitStack() as stack:
        for parent in parents:  # the kubelet's
            parent.mkdir()
            stack.callback(parent.rmdir)
        found = Crio(tmp_path / "crio", Path("/run/netns") / name)
        stack.callback(shutil.rmtree, found.folder)
        stack.callback(found.unmount)
        yield found


async def test_a_pod_as_crio_runs_it(crio: Crio) -> None:
    pod = crio.container(*PAUSE, sandbox=True)
    main = crio.container("sh", "-c", LIVES, mounts=[crio.image_volume("/volume")])
    unborn = crio.container("sleep", "1000")
    with contextlib.ExitStack() as stack:
        for container in (pod, main, unborn):
            stack.callback(container.close)
        try:
            await _run(pod, main, unborn)
        except BaseException:
            with contextlib.suppress(RpcError, OSError):
                await pod.call("Shutdown", now=True)
            raise


async def _run(pod: CrioContainer, main: CrioContainer, unborn: CrioContainer) -> None:
    address = await pod.start_shim()
    await pod.call("Create", bundle=str(pod.bundle), **pod.streams())
    await pod.call("Start")
    assert (await pod.call("State")).status == task_pb2.RUNNING
    pod_ends = asyncio.create_task(pod.call("Wait"))

    assert await main.start_shim() == address, "one shim for the pod"
    await main.call("Create", bundle=str(main.bundle), **main.streams())
    assert (await main.call("State")).status == task_pb2.CREATED
    await main.call("Kill", signal=0)
    await main.call("Start")
    main_ends = asyncio.create_task(main.call("Wait"))
    assert (await main.call("State")).status == task_pb2.RUNNING
    await main.says(b"up\n")

    # the profile, whose default is ENOSYS, and the volume
    look = (
        "grep Seccomp: /proc/self/status; unshare -U true; cat /volume/etc/passwd; touch /volume/x; cat /etc/hostname"
    )
    assert await main.exec("e1", "sh", "-c", look) == 0
    for said in (b"Seccomp:\t2\n", b"Function not implemented", b"root:x:0:0", b"Read-only file system", b"crio-pod\n"):
        await main.says(said)
    with pytest.raises(RpcError, match=r'exec: "nowhere": executable file not found in \$PATH'):
        await main.exec("e2", "nowhere")

    # statistics, of which CRI-O takes every part for granted; before a log is rotated it asks whether the task lives
    stats = (await main.call("Stats")).stats
    if stats.type_url.endswith("v1.Metrics"):
        v1 = metrics_v1_pb2.Metrics.FromString(stats.value)
        assert v1.memory.HasField("kernel_tcp")
        assert v1.HasField("memory_oom_control")
        assert (v1.memory.usage.limit, v1.memory.usage.usage > 0, v1.cpu.usage.total > 0) == (64 << 20, True, True)
    else:
        v2 = metrics_v2_pb2.Metrics.FromString(stats.value)
        assert v2.HasField("memory_events")
        assert (v2.memory.usage_limit, v2.memory.usage > 0, v2.cpu.usage_usec > 0) == (64 << 20, True, True)
    await main.call("Kill", signal=0)
    resources = b'{"memory":{"limit":134217728,"swap":134217728},"cpu":{"quota":50000,"period":100000}}'
    kind = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
    await main.call("Update", resources={"type_url": kind, "value": resources})
    assert await main.exec("e3", "cat", "/sys/fs/cgroup/memory.max") == 0
    await main.says(b"134217728\n")

    # CRI-O starts again
    for container in (pod, main):
        await container.reconnect()
        assert (await container.call("State")).status == task_pb2.RUNNING
    for broken in (pod_ends, main_ends):
        with pytest.raises(RpcError):
            await broken
    pod_ends, main_ends = asyncio.create_task(pod.call("Wait")), asyncio.create_task(main.call("Wait"))
    main.output = b""
    await main.says(b"tick\n")

    # stop and remove a container; the pod goes on
    await main.call("Kill", signal=15)
    assert (await asyncio.wait_for(main_ends, 30)).exit_status == 9
    assert (await main.call("State")).exit_status == 9
    assert main.output.endswith(b"bye\n")
    with pytest.raises(RpcError) as gone:
        await main.call("Kill", signal=0)
    assert gone.value.code is StatusCode.NOT_FOUND
    await main.call("Kill", signal=15)  # it asked before it knew
    await main.call("Delete")
    await main.call("Shutdown")

    # one that is created and never started
    await unborn.start_shim()
    await unborn.call("Create", bundle=str(unborn.bundle), **unborn.streams())
    waiting = asyncio.create_task(unborn.call("Wait"))
    await unborn.call("Kill", signal=15)
    assert (await asyncio.wait_for(waiting, 30)).exit_status == 128 + 15
    await unborn.call("Delete")
    await unborn.call("Shutdown")

    # the pod
    assert (await pod.call("State")).status == task_pb2.RUNNING
    await pod.call("Kill", signal=15)
    assert (await asyncio.wait_for(pod_ends, 30)).exit_status == 0
    assert (await pod.call("State")).status == task_pb2.STOPPED
    await pod.call("Delete")
    await pod.call("Shutdown")
    socket = address.removeprefix("unix://")
    await asyncio.to_thread(wait_for, lambda: not os.path.exists(socket), "the shim has ended", 30)
