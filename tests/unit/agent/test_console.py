"""The guest's end of the debug console, on unix sockets in the place of vsock: shells of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from katapod.rpc.agent import AgentClient
from katapod.rpc.client import TtrpcClient
from katapod.rpc.console import VM_ID
from katapod.rpc.pb import agent_pb2, oci_pb2
from katapod.rpc.status import RpcError, StatusCode
from katapod.sandbox.raw_console import carry_raw
from katapod.sandbox.stdio import GuestProcess, InputFd, OutputFd
from kit.loop_time import until

SERVE = """
import sys
from katapod.agent.console import serve_addresses
from katapod.agent.loop import Loop
loop = Loop()
loop.run(serve_addresses(loop, *sys.argv[1:]))
"""
SLOW_RESIZE = """
import time
from katapod.agent.process import Stdio
resize = Stdio.resize
Stdio.resize = lambda *arguments: (time.sleep(0.5), resize(*arguments))
"""
HUNG_UP = 129


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    before = getattr(request, "param", "")
    process = subprocess.Popen(
        [sys.executable, "-c", before + SERVE, f"unix://{tmp_path}/raw", f"unix://{tmp_path}/service"],
        stdin=subprocess.DEVNULL,
    )
    try:
        yield tmp_path
    finally:
        process.kill()
        process.wait()


async def _connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)

    def connects() -> bool:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            sock.connect(str(path))
            return True
        return False

    await until(connects)
    return sock


@pytest.fixture
async def console(folder: Path) -> AsyncIterator[AgentClient]:
    connection = await TtrpcClient.on_socket(await _connected(folder / "service"), "console")
    yield AgentClient(connection)
    connection.close()


async def _start(console: AgentClient, exec_id: str, *arguments: str, terminal: bool = False) -> GuestProcess:
    process = oci_pb2.Process(Args=arguments, Terminal=terminal, Env=["NAME=value"])
    process.ConsoleSize.Height, process.ConsoleSize.Width = 33, 101
    request = agent_pb2.ExecProcessRequest(container_id=VM_ID, exec_id=exec_id, process=process)
    await console.call("ExecProcess", request, timeout_s=60)
    return GuestProcess(console, VM_ID, exec_id, terminal=terminal)


async def _output(process: GuestProcess, method: str = "ReadStdout") -> bytes:
    found = b""
    while data := await process.agent.read_stream(method, VM_ID, process.exec_id, 4096):
        found += data
    return found


async def _line(process: GuestProcess) -> bytes:
    """The next line of output, which a terminal may hand over in pieces."""
    found = b""
    while not found.endswith(b"\n"):
        found += await process.agent.read_stream("ReadStdout", VM_ID, process.exec_id, 1)
    return found


async def test_command_with_pipes(console: AgentClient) -> None:
    await console.check(60)
    process = await _start(console, "one", "sh", "-c", "cat; echo $NAME >&2; pwd; exit 7")
    await console.write_stdin(VM_ID, "one", b"typed\n")
    await process.close_stdin()
    assert await _output(process) == b"typed\n/\n"
    assert await _output(process, "ReadStderr") == b"value\n"
    assert await process.wait() == 7
    with pytest.raises(RpcError) as caught:  # told to its end: forgotten
        await process.wait()
    assert caught.value.code is StatusCode.NOT_FOUND


async def test_command_with_a_terminal(console: AgentClient) -> None:
    process = await _start(console, "one", "sh", "-c", "stty size; read x; stty size; tty", terminal=True)
    assert await _line(process) == b"33 101\r\n"
    await process.resize(5, 6)
    await console.write_stdin(VM_ID, "one", b"\n")
    assert b"\n5 6\r\n/dev/pts/" in await _output(process)
    assert await process.wait() == 0


@pytest.mark.parametrize("folder", [SLOW_RESIZE], indirect=True, ids=["slow"])
async def test_the_size_of_a_terminal_is_there_before_its_process(console: AgentClient) -> None:
    process = await _start(console, "one", "stty", "size", terminal=True)
    assert await _output(process) == b"33 101\r\n"
    assert await process.wait() == 0


async def test_what_cannot_be_run(console: AgentClient, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program")
    for arguments, code in (
        (["no-such-program"], StatusCode.NOT_FOUND),
        (["/no/such/program"], StatusCode.NOT_FOUND),
        ([str(plain)], StatusCode.PERMISSION_DENIED),
    ):
        with pytest.raises(RpcError) as caught:
            await _start(console, "one", *arguments)
        assert caught.value.code is code
        assert f'"{arguments[0]}"' in caught.value.message
    with pytest.raises(RpcError) as caught:
        await console.call("ExecProcess", agent_pb2.ExecProcessRequest(container_id="c1", exec_id="one"), timeout_s=60)
    assert caught.value.code is StatusCode.INVALID_ARGUMENT
    with pytest.raises(RpcError) as caught:
        await console.call("CreateSandbox", agent_pb2.CreateSandboxRequest(), timeout_s=60)
    assert caught.value.code is StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("terminal", [False, True])
async def test_hang_up(console: AgentClient, terminal: bool) -> None:
    """SIGHUP to the shell and what runs in it; who reads is told the end."""
    process = await _start(console, "one", "sh", "-c", "echo $$; sleep 1000; true", terminal=terminal)
    pid = int(await _line(process))
    reading = asyncio.create_task(_output(process))
    await console.check(60)  # the read, asked for before it, waits in the guest
    await process.signal(1)
    assert await asyncio.wait_for(reading, 60) == b""
    assert await asyncio.wait_for(process.wait(), 60) == HUNG_UP
    assert not os.path.exists(f"/proc/{pid}")


async def test_no_more_than_so_many(console: AgentClient) -> None:
    for number in range(64):
        await _start(console, f"n{number}", "sleep", "1000")
    with pytest.raises(RpcError) as caught:
        await _start(console, "over", "sleep", "1000")
    assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
    for number in range(64):
        await console.call(
            "SignalProcess", agent_pb2.SignalProcessRequest(container_id=VM_ID, exec_id=f"n{number}", signal=1)
        )


async def test_raw_console(folder: Path) -> None:
    """What upstream's kata-runtime does, by our client of it."""
    sock = await _connected(folder / "raw")
    ours, theirs = os.pipe()
    out_read, out_write = os.pipe()
    os.write(theirs, b"PS1=; tty; echo num$((40+2)); exit\n")
    await asyncio.wait_for(carry_raw(sock, InputFd(ours), OutputFd(out_write)), 60)
    said = os.read(out_read, 65536)
    assert b"/dev/pts/" in said
    assert b"\r\nnum42\r\n" in said
    for fd in (ours, theirs, out_read, out_write):
        os.close(fd)


async def test_raw_console_ends_with_its_host(folder: Path) -> None:
    loop = asyncio.get_running_loop()
    sock = await _connected(folder / "raw")
    await loop.sock_sendall(sock, b"PS1=; echo pid=$$=; sleep 1000\n")
    said = b""
    while b"pid=" not in said.replace(b"pid=$$", b"") or b"=\r\n" not in said.rpartition(b"pid=")[2]:
        said += await loop.sock_recv(sock, 4096)
    pid = int(said.rpartition(b"pid=")[2].partition(b"=")[0])
    sock.close()
    await until(lambda: not os.path.exists(f"/proc/{pid}"))
