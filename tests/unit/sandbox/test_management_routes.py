"""The routes of the management socket, with a guest that answers as it likes."""

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapod.host.process_metrics import CallTimes, family_text
from katapod.model.errors import NotFound
from katapod.rpc.pb import agent_pb2, csi_pb2
from katapod.rpc.status import RpcError, StatusCode
from katapod.sandbox.management import Managed, guest_metrics, management_socket


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


class Pod(Managed):
    sandbox_id = "s1"
    agent_url = "vsock://42:1024"

    def __init__(self, vmm_pid: int) -> None:
        self.guest = Guest()
        self.vmm = vmm_pid
        self.times = CallTimes("kata_shim_rpc_durations_histogram_milliseconds", "Latency of task calls.")

    @property
    def agent(self) -> Guest:
        return self.guest

    @property
    def vmm_pid(self) -> int:
        return self.vmm

    @property
    def virtiofsd_pids(self) -> Sequence[int]:
        return [2**22 + 1]  # beyond the largest pid: it has ended

    @property
    def call_times(self) -> Sequence[CallTimes]:
        return [self.times]

    def guest_path(self, volume_path: str) -> str:
        if volume_path != "/dev/vol":
            raise NotFound(f"cannot find the volume {volume_path}")
        return "/guest/vol"


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


def test_a_guest_speaks_for_itself_alone() -> None:
    text = (
        '# HELP kata_shim_threads lies\nkata_shim_threads 9\nkata_guest_load{item="load1"} 1\n# TYPE go_info gauge\n'
        "go_info 1\nprocess_x 2\n# EOF\n\nkata_agent_scrape_count 3\n"
    )
    assert guest_metrics(text) == (
        'kata_guest_load{item="load1"} 1\n# TYPE kata_agent_go_info gauge\n'
        "kata_agent_go_info 1\nkata_agent_process_x 2\nkata_agent_scrape_count 3\n"
    )


def test_a_guest_that_talks_too_much_is_cut_at_a_line() -> None:
    found = guest_metrics("kata_guest_x 1\n" * 200_000)
    assert len(found) <= 1 << 20
    assert found.endswith("kata_guest_x 1\n")


@given(st.text())
def test_whatever_a_guest_says_no_line_is_another_ones(text: str) -> None:
    for line in guest_metrics(text).splitlines():
        assert line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith(("kata_guest_", "kata_agent_"))


def test_label_values_are_escaped() -> None:
    assert family_text("x", "gauge", "X.", [({"a": 'b"\\\n'}, 1)]).splitlines()[-1] == 'x{a="b\\"\\\\\\n"} 1'
