"""The management socket of a real machine."""

import asyncio
import json
import os
import signal
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from vm_helper import Owned, cloned_plan, needs_guest_image, needs_vm, qemu_of

from katapod.host.mounts import bind
from katapod.host.state import StateStore
from katapod.observe.management_server import management_server
from katapod.sandbox.lifecycle import Sandbox, start_sandbox
from katapod.sandbox.recovery import remove_sandbox
from kit.library import layout_below

pytestmark = [
    *needs_vm,
    needs_guest_image,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.qemu("QEMU's machines by the library"),
]


@asynccontextmanager
async def managed() -> AsyncIterator[Sandbox]:
    sandbox_id = f"mg-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="kp") as root:
        store = StateStore(layout_below(Path(root)))
        with Owned(store, sandbox_id):
            sandbox = await start_sandbox(cloned_plan(store.layout, sandbox_id), store)
            try:
                async with management_server(sandbox):
                    yield sandbox
                assert not sandbox.paths.management_socket.exists()
            finally:
                await sandbox.close()
        await remove_sandbox(store, sandbox_id)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox() -> AsyncIterator[Sandbox]:
    async with managed() as found:
        yield found


async def ask(sandbox: Sandbox, method: str, target: str, body: bytes = b"") -> tuple[int, str]:
    reader, writer = await asyncio.open_unix_connection(str(sandbox.paths.management_socket))
    writer.write(f"{method} {target} HTTP/1.1\r\nHost: shim\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    head, _, text = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), text.decode()


async def test_a_server_that_has_no_client(sandbox: Sandbox) -> None:
    assert sandbox.paths.management_socket.is_socket()


async def test_what_a_sandbox_says_about_itself(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("PATIENCE_S", "ANSWER_LIMIT_S"):  # a slow guest's part is left out otherwise
        monkeypatch.setattr(f"katapod.observe.guest_figures.{limit}", 30.0)
    answers = await asyncio.gather(*(ask(sandbox, "GET", "/metrics") for _ in range(4)))
    for status, text in answers:
        assert status == 200
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        values = dict(line.rsplit(" ", 1) for line in lines)
        assert len(values) == len(lines)
        assert float(values["kata_hypervisor_threads"]) >= 2
        assert float(values["kata_virtiofsd_threads"]) >= 1
        assert float(values['kata_hypervisor_proc_status{item="vmrss"}']) > 32 << 20
        assert float(values["kata_agent_scrape_count"]) >= 1
        assert any(name.startswith("kata_guest_meminfo{") for name in values)
        families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")]
        assert len(families) == len(set(families))
    assert (await ask(sandbox, "GET", "/nowhere"))[0] == 404
    status, text = await ask(sandbox, "GET", "/agent-url")
    assert (status, text) == (200, f"vsock://{sandbox.vsock_cid}:1024") if sandbox.vsock_cid else status == 500


async def test_a_volume_is_found_by_what_is_mounted(sandbox: Sandbox, tmp_path: Path) -> None:
    bind(tmp_path, sandbox.paths.mounts / "volume")
    status, text = await ask(sandbox, "GET", f"/direct-volume/stats?path={tmp_path}")
    assert status == 200, text
    total = [each["total"] for each in json.loads(text)["usage"] if each["unit"] == 1]
    assert total[0] > 0
    assert (await ask(sandbox, "GET", "/direct-volume/stats?path=/dev/null"))[0] == 404


async def test_a_guest_that_has_gone_leaves_the_hosts_part(caplog: pytest.LogCaptureFixture) -> None:
    async with managed() as sandbox:
        sandbox.vm.stopping = sandbox.share.stopping = True
        os.kill(qemu_of(sandbox).pid, signal.SIGKILL)
        await sandbox.vm.wait_end()
        status, text = await ask(sandbox, "GET", "/metrics")
        assert status == 200
        assert "kata_shim_threads" in text
        assert "kata_hypervisor_threads" not in text
        assert "is missing" in caplog.text
