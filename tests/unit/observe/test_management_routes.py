"""The routes of the management socket, with a guest that answers as it likes."""

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from katapod.model.errors import KatapodError, NotFound
from katapod.model.guest_metrics import LINES_MAX
from katapod.model.inspection import Channel, LiveFacts
from katapod.observe.guest_figures import GuestFigures
from katapod.observe.management import ObservedSandbox
from katapod.observe.process_metrics import family_text
from katapod.rpc.call_times import CallTimes
from katapod.rpc.http import HEAD_MAX, HttpError, get_http
from katapod.rpc.pb import agent_pb2, csi_pb2, inspection_pb2
from katapod.rpc.status import RpcError, StatusCode
from katapod.vmm.errors import VmmLinkBroken
from katapod.vmm.qemu.facts import ask_hypervisor
from kit.management_socket import management_socket


class Guest:
    """An agent: answers and errors by method; it keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, Any]] = []

    async def call(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        self.asked.append((method, request))
        answer = self.answers.get(method, RpcError(StatusCode.UNIMPLEMENTED, f"method {method}"))
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def inspect(self, timeout_s: float) -> Any:
        return await self.call("Inspect", None, timeout_s)


class Qemu:
    """A monitor: answers by question; an error if it has none."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}

    async def execute(self, command: str, arguments: Any = None, *, limit_s: float = 1.0) -> Any:
        if command not in self.answers:
            raise VmmLinkBroken(f"cannot {command}: QEMU did not answer within {limit_s:g} s")
        return self.answers[command]

    async def facts(self, limit_s: float) -> Any:
        return await ask_hypervisor(self, limit_s, {})


class Pod(ObservedSandbox):
    sandbox_id = "s1"
    agent_url = "vsock://42:1024"

    def __init__(self, vmm_pid: int) -> None:
        self.guest = Guest()
        self.monitor = Qemu()
        self.vmm = vmm_pid
        self.times = CallTimes("kata_shim_rpc_durations_histogram_milliseconds", "Latency of task calls.")

    @property
    def agent(self) -> Guest:
        return self.guest

    @property
    def vm(self) -> Qemu:
        return self.monitor

    @property
    def vmm_pid(self) -> int:
        return self.vmm

    @property
    def virtiofsd_pids(self) -> Sequence[int]:
        return [2**22 + 1]  # beyond the largest pid: it has ended

    @property
    def call_times(self) -> Sequence[CallTimes]:
        return [self.times]

    vmm_helpers: Sequence[int] = ()
    disk_server_pids: Sequence[int] = ()
    vcpus = 2
    mem_mib = 256
    has_network = False

    async def overhead(self, seconds: float) -> tuple[float, int]:
        return 12.5, 1 << 20

    def guest_path(self, volume_path: str) -> str:
        if volume_path != "/dev/vol":
            raise NotFound(f"cannot find the volume {volume_path}")
        return "/guest/vol"

    async def resize_volume(self, volume_path: str, size: int) -> None:
        if size > 1 << 50:
            raise KatapodError(f"cannot resize {volume_path}: it has not that much")


@pytest.fixture
def sleeper() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    process.kill()
    process.wait()


@pytest.fixture
async def pod(tmp_path: Path, sleeper: int) -> AsyncIterator[Pod]:
    pod = Pod(sleeper)
    async with management_socket(pod, tmp_path / "m.sock"):
        yield pod
    assert not (tmp_path / "m.sock").exists()


async def ask(tmp_path: Path, method: str, target: str, body: bytes = b"") -> tuple[int, str]:
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "m.sock"))
    writer.write(f"{method} {target} HTTP/1.1\r\nHost: shim\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    head, _, text = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), text.decode()


async def test_metrics(pod: Pod, tmp_path: Path) -> None:
    pod.guest.answers["GetMetrics"] = agent_pb2.Metrics(metrics="# TYPE kata_guest_load gauge\nkata_guest_load 1\n")
    pod.times.observe("create", 0.003)
    status, text = await ask(tmp_path, "GET", "/metrics")
    lines = text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert status == 200
    assert len(values) == sum(not line.startswith("#") for line in lines)  # no series twice
    assert float(values["kata_shim_threads"]) >= 1
    assert float(values['kata_shim_proc_status{item="vmrss"}']) > 1 << 20
    assert float(values["kata_shim_process_resident_memory_bytes"]) > 1 << 20
    assert values["kata_hypervisor_threads"] == "1"
    assert 'kata_hypervisor_netdev{interface="lo",item="recv_bytes"}' in values
    assert 'kata_hypervisor_io_stat{item="readbytes"}' in values
    assert not any(name.startswith("kata_virtiofsd") for name in values)
    name = "kata_shim_rpc_durations_histogram_milliseconds"
    assert values[f'{name}_bucket{{action="create",le="2"}}'] == "0"
    assert values[f'{name}_bucket{{action="create",le="4"}}'] == "1"
    assert values[f'{name}_bucket{{action="create",le="+Inf"}}'] == "1"
    assert values[f'{name}_count{{action="create"}}'] == "1"
    assert lines[-2:] == ["# TYPE kata_guest_load gauge", "kata_guest_load 1"]


@pytest.mark.parametrize(
    ("code", "asked_again"),
    [(StatusCode.NOT_FOUND, False), (StatusCode.UNIMPLEMENTED, False), (StatusCode.DEADLINE_EXCEEDED, True)],
)
async def test_a_guest_without_metrics(pod: Pod, tmp_path: Path, code: StatusCode, asked_again: bool) -> None:
    pod.guest.answers["GetMetrics"] = RpcError(code, "no")
    for _ in range(2):
        status, text = await ask(tmp_path, "GET", "/metrics")
        assert status == 200
        assert "kata_shim_threads" in text
    assert len(pod.guest.asked) == (2 if asked_again else 1)


async def test_agent_url(pod: Pod, tmp_path: Path) -> None:
    assert await ask(tmp_path, "GET", "/agent-url") == (200, "vsock://42:1024")
    pod.agent_url = ""
    status, text = await ask(tmp_path, "GET", "/agent-url")
    assert status == 500
    assert "serial port" in text


@pytest.mark.parametrize(("path", "v6"), [("/iptables", False), ("/ip6tables", True)])
async def test_iptables(pod: Pod, tmp_path: Path, path: str, v6: bool) -> None:
    pod.guest.answers["GetIPTables"] = agent_pb2.GetIPTablesResponse(data=b"*filter\n")
    pod.guest.answers["SetIPTables"] = agent_pb2.SetIPTablesResponse(data=b"ok")
    assert await ask(tmp_path, "GET", path) == (200, "*filter\n")
    assert await ask(tmp_path, "PUT", path, b"*nat\n") == (200, "ok")
    assert pod.guest.asked == [
        ("GetIPTables", agent_pb2.GetIPTablesRequest(is_ipv6=v6)),
        ("SetIPTables", agent_pb2.SetIPTablesRequest(is_ipv6=v6, data=b"*nat\n")),
    ]


async def test_volumes(pod: Pod, tmp_path: Path) -> None:
    answer = csi_pb2.VolumeStatsResponse()
    answer.usage.add(available=1, total=3, used=2, unit=csi_pb2.VolumeUsage.BYTES)
    pod.guest.answers |= {"GetVolumeStats": answer, "ResizeVolume": None}
    status, text = await ask(tmp_path, "GET", "/direct-volume/stats?path=%2Fdev%2Fvol")
    assert status == 200
    assert json.loads(text) == {
        "usage": [{"available": 1, "total": 3, "used": 2, "unit": 1}],
        "volume_condition": {"abnormal": False, "message": ""},
    }
    body = json.dumps({"VolumePath": "/dev/vol", "Size": 1 << 40}).encode()
    assert await ask(tmp_path, "POST", "/direct-volume/resize", body) == (200, "")
    assert pod.guest.asked[-1][1] == agent_pb2.ResizeVolumeRequest(volume_guest_path="/guest/vol", size=1 << 40)


async def test_policy(pod: Pod, tmp_path: Path) -> None:
    pod.guest.answers["SetPolicy"] = None
    assert await ask(tmp_path, "PUT", "/policy", b"package x") == (200, "")
    assert pod.guest.asked == [("SetPolicy", agent_pb2.SetPolicyRequest(policy="package x"))]


@pytest.mark.parametrize(
    ("method", "target", "body", "status"),
    [
        ("GET", "/", b"", 404),
        ("GET", "/metrics/", b"", 404),
        ("GET", "/debug/pprof/", b"", 404),
        ("POST", "/metrics", b"", 501),
        ("POST", "/iptables", b"", 501),
        ("GET", "/policy", b"", 501),
        ("PUT", "/policy", b"\xff", 400),
        ("GET", "/direct-volume/stats", b"", 400),
        ("GET", "/direct-volume/stats?path=/other", b"", 404),
        ("POST", "/direct-volume/resize", b"{", 400),
        ("POST", "/direct-volume/resize", b'{"VolumePath": "/dev/vol", "Size": -1}', 400),
        ("POST", "/direct-volume/resize", b'{"VolumePath": "/dev/vol", "Size": 9007199254740992}', 500),
        ("POST", "/direct-volume/resize", b'{"VolumePath": "/dev/vol", "Size": 18446744073709551616}', 400),
        ("GET", "/iptables", b"", 500),  # the agent has no such method
    ],
)
async def test_errors(pod: Pod, tmp_path: Path, method: str, target: str, body: bytes, status: int) -> None:
    found, text = await ask(tmp_path, method, target, body)
    assert found == status
    assert text


async def test_only_for_root_and_over_what_was_left(tmp_path: Path, sleeper: int) -> None:
    (tmp_path / "m.sock").write_text("left")
    async with management_socket(Pod(sleeper), tmp_path / "m.sock"):
        assert os.stat(tmp_path / "m.sock").st_mode & 0o777 == 0o600


async def test_a_summary(pod: Pod, tmp_path: Path) -> None:
    text = (
        'kata_guest_meminfo{item="mem_total"} 1000\nkata_guest_meminfo{item="mem_available"} 400\n'
        'kata_guest_load{item="load1"} 0.25\nkata_guest_tasks{item="max"} NaN\n'
    )
    pod.guest.answers["GetMetrics"] = agent_pb2.Metrics(metrics=text)
    status, body = await ask(tmp_path, "GET", "/summary?guest=1")
    found = json.loads(body)
    assert status == 200
    assert found["guest"] == {"memory_total": 1000, "memory_available": 400, "load1": 0.25, "tasks": 0}
    assert found["vmm_state"] in ("R", "S", "D")  # it may be at its beginning, and wait for a disk
    assert found["memory"]["supervisor"] > 1 << 20
    assert found["net_received"] is None
    asked = len(pod.guest.asked)
    assert json.loads((await ask(tmp_path, "GET", "/summary"))[1])["guest"] is None
    assert len(pod.guest.asked) == asked  # the guest is not disturbed


async def test_who_serves_disks_counts_as_the_vmm_and_has_metrics(pod: Pod, tmp_path: Path) -> None:
    vmm = json.loads((await ask(tmp_path, "GET", "/summary"))[1])["memory"]["vmm"]
    pod.disk_server_pids = [os.getpid()]
    assert json.loads((await ask(tmp_path, "GET", "/summary"))[1])["memory"]["vmm"] > vmm
    assert "\nkata_storage_daemon_threads " in (await ask(tmp_path, "GET", "/metrics"))[1]


async def test_a_slow_guest_costs_only_its_own_part(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told a scrape late, and asked once at a time."""
    said = asyncio.Event()

    async def call(method: str, request: Any, timeout_s: float | None = None) -> Any:
        pod.guest.asked.append((method, request))
        await said.wait()
        return agent_pb2.Metrics(metrics="kata_guest_x 1\n")

    monkeypatch.setattr(pod.guest, "call", call)
    figures = GuestFigures(pod, patience_s=0.01)
    assert [await figures.text(), await figures.text()] == ["", ""]
    assert len(pod.guest.asked) == 1
    said.set()
    assert await GuestFigures(pod).text() == "kata_guest_x 1\n"
    await asyncio.sleep(0.05)
    assert await figures.text() == "kata_guest_x 1\n"
    assert len(pod.guest.asked) == 2
    await figures.close()


async def test_a_guest_that_says_too_much_is_cut_and_told_of_once(pod: Pod, caplog: pytest.LogCaptureFixture) -> None:
    pod.guest.answers["GetMetrics"] = agent_pb2.Metrics(metrics="kata_guest_x 1\n" * 200_000)
    figures = GuestFigures(pod, patience_s=60)
    for _ in range(2):
        assert (await figures.text()).count("\n") == LINES_MAX
    assert [record.getMessage() for record in caplog.records] == [
        "the guest of s1 says too much in its metrics: the rest is left out"
    ]


async def test_the_overhead_is_that_after_the_scrape_before(pod: Pod, tmp_path: Path) -> None:
    assert "overhead" not in (await ask(tmp_path, "GET", "/metrics"))[1]
    await asyncio.sleep(0)
    text = (await ask(tmp_path, "GET", "/metrics"))[1]
    assert "kata_shim_pod_overhead_cpu 12.5\n" in text
    assert "kata_shim_pod_overhead_memory_in_bytes 1048576\n" in text


def test_label_values_are_escaped() -> None:
    assert family_text("x", "gauge", "X.", [({"a": 'b"\\\n'}, 1)]).splitlines()[-1] == 'x{a="b\\"\\\\\\n"} 1'


async def test_inspect_tells_what_answers(pod: Pod, tmp_path: Path) -> None:
    """Neither QEMU nor the agent: both are named, with the reason; the channel is known anyhow."""
    status, text = await ask(tmp_path, "GET", "/inspect")
    live = msgspec.json.decode(text, type=LiveFacts)
    assert (status, live.hypervisor, live.guest) == (200, None, None)
    assert {one.part: one.why for one in live.missing}["guest"].startswith("the guest's agent does not tell")
    assert any("QEMU did not answer" in one.why for one in live.missing)
    assert live.channel == Channel(kind="vsock", address="vsock://42:1024")
    pod.guest.answers["Inspect"] = inspection_pb2.InspectResponse(kernel="6.1", uptime_s=1.5)
    live = msgspec.json.decode((await ask(tmp_path, "GET", "/inspect"))[1], type=LiveFacts)
    assert live.guest is not None
    assert live.guest.kernel == "6.1"
    assert (await ask(tmp_path, "POST", "/inspect"))[0] == 501


async def test_the_client_of_the_socket(pod: Pod, tmp_path: Path) -> None:
    path = str(tmp_path / "m.sock")
    assert b"missing" in await get_http(path, "/inspect", limit_s=60, body_max=10_000)
    with pytest.raises(HttpError, match="more than"):
        await get_http(path, "/metrics", limit_s=60, body_max=10 - HEAD_MAX)
    with pytest.raises(HttpError, match="URL NOT FOUND"):
        await get_http(path, "/nothing", limit_s=60, body_max=10_000)
