"""`start`, the server and `delete` as the processes that containerd and CRI-O run, without a VM."""

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from shim_guest_helper import bundle_at, listening

import katapod
from katapod.model.layout import Layout
from katapod.rpc.client import TtrpcClient
from katapod.rpc.status import RpcError, StatusCode
from katapod.shim import delete as delete_module
from katapod.shim import leftovers
from katapod.shim import serve as serve_module
from katapod.shim import start as start_module
from katapod.shim.arguments import parse_arguments
from katapod.shim.pb import runtime_pb2, task_pb2
from katapod.shim.start import SOCKET_ROOT, STDIN_MAX

SHIM = [sys.executable, "-c", "from katapod.shim.main import main; main()"]
LIMIT_S = 60.0
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="what it looks at belongs to root: /run/containerd, /run/vc")
NAMESPACE = "katapod-unit"


class Engine:
    """What containerd does with the binary; sockets lie below `sockets` for who sends bootstrap parameters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sockets = folder / "s"
        self.address = str(folder / "containerd.sock")
        self.pids: set[int] = set()

    def bundle(self, name: str, annotations: dict[str, str] | None = None) -> Path:
        return bundle_at(self.folder / name, annotations)

    def run(
        self, bundle: Path, action: str, given: bytes | None = None, *, id: str = "", env: dict[str, str] | None = None
    ) -> "subprocess.CompletedProcess[bytes]":
        container_id = id or bundle.name
        if given is None:
            given = runtime_pb2.BootstrapParams(
                instance_id=container_id, namespace=NAMESPACE, socket_dir=str(self.sockets)
            ).SerializeToString()
        words = ["-namespace", NAMESPACE, "-address", self.address, "-publish-binary", "/bin/true", "-id", container_id]
        done = subprocess.run(
            [*SHIM, *words, "-bundle", str(bundle), action],
            cwd=bundle,
            input=given,
            capture_output=True,
            timeout=LIMIT_S,
            env={**os.environ, "TTRPC_ADDRESS": "", **(env or {})},
        )
        with contextlib.suppress(OSError, ValueError):
            self.pids.add(int((bundle / "shim.pid").read_text()))
        return done

    def start(self, bundle: Path, given: bytes | None = None) -> str:
        """Returns the path of the socket."""
        done = self.run(bundle, "start", given)
        assert (done.returncode, done.stderr) == (0, b""), done.stderr
        address = done.stdout.decode()
        assert address.startswith("unix://")
        assert address == (bundle / "address").read_text(), "what is printed is what is left for a restart"
        return address.removeprefix("unix://")

    def pid(self, bundle: Path) -> int:
        return int((bundle / "shim.pid").read_text())

    def socket_of(self, container_id: str) -> Path:
        text = f"{self.address}/{NAMESPACE}/{container_id}"
        return self.sockets / hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def engine() -> Iterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="shim-") as folder:  # pytest's are too long for paths of sockets
        found = Engine(Path(folder))
        yield found
        for pid in found.pids:
            if is_shim(pid):
                os.kill(pid, signal.SIGKILL)


def is_shim(pid: int) -> bool:
    """Whether it runs. What has ended may wait for an init that collects it: its command line is empty then."""
    with contextlib.suppress(OSError):
        return b"katapod.shim.main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def call(path: str, method: str, request: object, answer: type | None = None) -> object:
    """One call of the server that listens at `path`."""

    async def work() -> bytes:
        client = await TtrpcClient.on_unix_path(path, "the shim")
        try:
            return await client.call_raw("containerd.task.v2.Task", method, request.SerializeToString(), LIMIT_S)  # type: ignore[attr-defined]
        finally:
            client.close()

    data = asyncio.run(work())
    return answer.FromString(data) if answer is not None else data  # type: ignore[attr-defined]


def connect(path: str) -> int:
    """The pid that the server has by its own account."""
    found = call(path, "Connect", task_pb2.ConnectRequest(id="x"), task_pb2.ConnectResponse)
    assert isinstance(found, task_pb2.ConnectResponse)
    return int(found.shim_pid)


def exit_of(done: "subprocess.CompletedProcess[bytes]") -> int:
    assert (done.returncode, done.stderr) == (0, b""), done.stderr
    answer = task_pb2.DeleteResponse.FromString(done.stdout)
    assert abs(answer.exited_at.seconds - time.time()) < LIMIT_S
    return int(answer.exit_status)


def test_start_serve_and_shut_down(engine: Engine) -> None:
    bundle = engine.bundle("c1")
    path = engine.start(bundle)
    assert Path(path) == engine.socket_of("c1")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(engine.sockets).st_mode) == 0o700
    pid = engine.pid(bundle)
    assert connect(path) == pid
    assert os.getsid(pid) == pid, "no terminal's Ctrl-C is to reach it"
    assert os.readlink(f"/proc/{pid}/cwd") == str(bundle)
    assert {os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1, 2)} == {"/dev/null"}

    assert engine.start(bundle) == path, "an answer that was lost is given again"
    assert engine.pid(bundle) == pid

    call(path, "Shutdown", task_pb2.ShutdownRequest(id="c1"))
    until(lambda: not is_shim(pid))
    assert not os.path.exists(path)
    assert sorted(entry.name for entry in bundle.iterdir()) == ["address", "config.json", "shim.pid"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("serves", [False, True])
def test_a_signal_ends_the_server(engine: Engine, number: signal.Signals, serves: bool) -> None:
    """Also before it has loaded what it serves with."""
    bundle = engine.bundle("c1")
    path = engine.start(bundle)
    if serves:
        connect(path)
    os.kill(engine.pid(bundle), number)
    until(lambda: not is_shim(engine.pid(bundle)))
    assert not os.path.exists(path)


@needs_root
def test_killed_then_deleted_then_started_again(engine: Engine) -> None:
    bundle = engine.bundle("c1")
    path = engine.start(bundle)
    connect(path)
    pid = engine.pid(bundle)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_shim(pid))
    assert os.path.exists(path)
    assert engine.start(bundle) == path, "a socket that nobody listens on is in nobody's way"
    again = engine.pid(bundle)
    assert connect(path) == again != pid
    os.kill(again, signal.SIGKILL)
    until(lambda: not is_shim(again))

    assert exit_of(engine.run(bundle, "delete", b"")) == 137
    assert not os.path.exists(path), "the socket's directory is known from the bundle alone"
    assert exit_of(engine.run(bundle, "delete", b"")) == 137


def test_a_server_that_is_going_away_is_in_nobodys_way(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has taken a killed server's memory, and not yet its socket, where connections wait to be accepted."""
    monkeypatch.setattr(start_module, "ANSWER_LIMIT_S", LIMIT_S)
    path = str(engine.folder / "dying.sock")
    dying = listening(path)

    def die() -> None:
        select.select([dying], [], [], LIMIT_S)  # until somebody has connected
        dying.close()

    with ThreadPoolExecutor() as threads:
        death = threads.submit(die)
        listener = start_module._listen(path)
        death.result()
    assert listener is not None
    with listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def test_a_server_that_is_slow_to_answer_lives(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_module, "ANSWER_LIMIT_S", 0.05)
    path = str(engine.folder / "slow.sock")
    with listening(path) as slow:
        assert start_module._listen(path) is None
        slow.accept()[0].close()


async def test_the_file_of_a_socket_goes_before_its_server(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a `start` that comes meanwhile finds no server that will be gone when it is called."""
    monkeypatch.setattr(serve_module, "ANSWER_S", 0.0)
    bundle = engine.bundle("c1")
    monkeypatch.chdir(bundle)
    path = str(engine.folder / "served.sock")
    served = []

    def unlink() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
        os.unlink(path)
        served.append(path)

    arguments = parse_arguments(["-namespace", NAMESPACE, "-id", "c1", "-bundle", str(bundle), "start"])
    serving = asyncio.create_task(serve_module._serve(arguments, listening(path), unlink))
    while True:
        with contextlib.suppress(OSError):
            client = await TtrpcClient.on_unix_path(path, "the shim")
            break
        await asyncio.sleep(0.01)
    request = task_pb2.ShutdownRequest(id="c1").SerializeToString()
    await client.call_raw("containerd.task.v2.Task", "Shutdown", request, LIMIT_S)
    await asyncio.wait_for(serving, LIMIT_S)
    client.close()
    assert served == [path]


@needs_root
def test_delete_ends_a_server_that_has_no_vm(engine: Engine) -> None:
    """Nobody else would: its socket goes, and it owns no sandbox that could be removed."""
    bundle = engine.bundle("c1")
    connect(engine.start(bundle))
    assert exit_of(engine.run(bundle, "delete", b"")) == 137
    until(lambda: not is_shim(engine.pid(bundle)))


@needs_root
def test_delete_where_there_is_nothing(engine: Engine) -> None:
    (engine.folder / "none").mkdir()
    assert exit_of(engine.run(engine.folder / "none", "delete", b"", id="katapod-unit-none")) == 137


@needs_root
def test_delete_touches_no_socket_but_its_own(engine: Engine) -> None:
    bundle = engine.bundle("katapod-unit-x")
    other = engine.folder / "other.sock"
    with listening(str(other)):
        (bundle / "address").write_text(f"unix://{other}")
        assert exit_of(engine.run(bundle, "delete", b"")) == 137
        assert other.exists()


@needs_root
@pytest.mark.parametrize("container_id", ["..", ".", "a/../b", "x"])
def test_delete_of_an_id_that_never_was_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], container_id: str
) -> None:
    """Ids name directories below the state's roots, which are removed."""
    roots = [engine.folder / name for name in ("state", "vm", "share", "data", "images")]
    layout = Layout(*(root / "inner" for root in roots))
    for root in roots:
        (root / "inner" / "other").mkdir(parents=True)
    monkeypatch.setattr("katapod.model.layout.Layout", lambda: layout)
    monkeypatch.setattr(leftovers, "Layout", lambda: layout)
    words = ["-namespace", NAMESPACE, "-id", container_id, "-bundle", str(engine.folder), "delete"]
    delete_module.delete(parse_arguments(words))
    assert task_pb2.DeleteResponse.FromString(capfdbinary.readouterr().out).exit_status == 137
    leftovers.remove_leftovers(container_id, [])
    assert all((root / "inner" / "other").is_dir() for root in roots)


@needs_root
@pytest.mark.parametrize(
    ("kind", "sandbox"),
    [
        ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
        ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
    ],
)
def test_a_container_of_a_pod_has_the_server_of_its_sandbox(engine: Engine, kind: str, sandbox: str) -> None:
    """CRI-O asks for every container, and finds each server again by the file in that container's bundle."""
    pod = engine.bundle("pod", {kind: "sandbox", sandbox: "pod"})
    path = engine.start(pod)
    workload = engine.bundle("w1", {kind: "container", sandbox: "pod"})
    assert engine.start(workload) == path
    assert not (workload / "shim.pid").exists()
    assert connect(path) == engine.pid(pod)
    assert exit_of(engine.run(workload, "delete", b"")) == 137
    assert connect(path) == engine.pid(pod), "the end of a workload is not the pod's"


@needs_root
def test_as_crio_does_it(engine: Engine) -> None:
    """No address of events, nothing on standard input, an empty -address: its sockets have the usual place."""
    engine.address = ""
    bundle = engine.bundle(f"katapod-unit-{os.getpid()}")
    before = Path(SOCKET_ROOT).is_dir()
    path = engine.start(bundle, b"")
    try:
        digest = hashlib.sha256(f"{NAMESPACE}/{bundle.name}".encode()).hexdigest()
        assert path == f"{SOCKET_ROOT}/{digest}"
        assert connect(path) == engine.pid(bundle)
        os.kill(engine.pid(bundle), signal.SIGKILL)
        until(lambda: not is_shim(engine.pid(bundle)))
        assert exit_of(engine.run(bundle, "delete", b"")) == 137
        assert not os.path.exists(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        if not before:
            with contextlib.suppress(OSError):
                os.rmdir(SOCKET_ROOT)


@needs_root
def test_options_of_older_versions_are_no_parameters(engine: Engine) -> None:
    options = runtime_pb2.Options(type_url="runtimeoptions.v1.Options", config_path="/x").SerializeToString()
    path = engine.start(engine.bundle(f"katapod-unit-{os.getpid()}"), options)
    try:
        assert path.startswith(f"{SOCKET_ROOT}/")
        assert connect(path)
        call(path, "Shutdown", task_pb2.ShutdownRequest(id="x"))
        until(lambda: not os.path.exists(path))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


@pytest.mark.parametrize(
    ("config", "given", "said"),
    [
        ("{", None, "is not JSON"),
        ('{"annotations": {"io.kubernetes.cri.container-type": "pod"}}', None, "container-type='pod'"),
        ("{}", b"x" * (STDIN_MAX + 1), "standard input has more than"),
        (None, None, "No such file"),
    ],
)
def test_start_that_is_refused(engine: Engine, config: str | None, given: bytes | None, said: str) -> None:
    bundle = engine.folder / "c1"
    bundle.mkdir()
    if config is not None:
        (bundle / "config.json").write_text(config)
    done = engine.run(bundle, "start", given)
    assert (done.returncode, done.stdout) == (1, b"")
    assert said in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert not engine.sockets.exists()
    assert not (bundle / "shim.pid").exists()


def test_bootstrap_parameters_that_cannot_be_parsed(engine: Engine) -> None:
    bundle = engine.bundle("c1")
    good = runtime_pb2.BootstrapParams(instance_id="c1", namespace=NAMESPACE).SerializeToString()
    done = engine.run(bundle, "start", good + b"\x4a\xff")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"standard input cannot be parsed" in done.stderr


def test_a_socket_directory_that_is_too_long(engine: Engine) -> None:
    engine.sockets = engine.folder / ("x" * 100)
    done = engine.run(engine.bundle("c1"), "start")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"cannot listen on" in done.stderr


@pytest.mark.parametrize("name", ["address", "shim.pid"])
def test_start_that_cannot_leave_its_answer_leaves_no_server(engine: Engine, name: str) -> None:
    bundle = engine.bundle("c1")
    (bundle / name).mkdir()  # a file cannot take its place
    (bundle / name / "full").touch()
    done = engine.run(bundle, "start")
    assert (done.returncode, done.stdout) == (1, b"")
    assert not engine.socket_of("c1").exists()

    def served() -> bool:
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):  # it may end meanwhile
                if entry.isdigit() and is_shim(int(entry)) and os.readlink(f"/proc/{entry}/cwd") == str(bundle):
                    return True
        return False

    until(lambda: not served())


def test_the_log_is_a_fifo_that_nobody_need_read(engine: Engine) -> None:
    bundle = engine.bundle("c1")
    os.mkfifo(bundle / "log")
    reader = os.open(bundle / "log", os.O_RDONLY | os.O_NONBLOCK)
    path = engine.start(bundle)
    connect(path)
    text = b""

    def has_said() -> bool:
        nonlocal text
        with contextlib.suppress(BlockingIOError):
            text += os.read(reader, 65536)
        return b"serving sandbox c1" in text

    until(has_said)
    os.close(reader)  # containerd restarts
    for _ in range(3):
        with pytest.raises(RpcError) as caught:
            call(path, "Start", task_pb2.StartRequest(id="nobody"))
        assert caught.value.code is StatusCode.NOT_FOUND
    assert connect(path) == engine.pid(bundle)


def test_a_peer_that_speaks_something_else_disturbs_nobody(engine: Engine) -> None:
    path = engine.start(engine.bundle("c1"))
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(LIMIT_S)
        peer.connect(path)
        peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert peer.recv(100) == b""
    assert connect(path)


def alone(*words: str, given: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run([*SHIM, *words], input=given, capture_output=True, timeout=LIMIT_S)


@pytest.mark.parametrize("words", [["-v"], ["--version"], ["-v", "-id", "x"]])
def test_version(words: list[str]) -> None:
    done = alone(*words)
    assert (done.returncode, done.stderr) == (0, b"")
    assert f"(Katapod) {katapod.__version__}: io.containerd.kata.v2" in done.stdout.decode()


@pytest.mark.parametrize("given", [b"", runtime_pb2.Options(config_path="/x").SerializeToString()])
def test_info(given: bytes) -> None:
    done = alone("-info", given=given)
    assert (done.returncode, done.stderr) == (0, b"")
    info = runtime_pb2.RuntimeInfo.FromString(done.stdout)
    assert (info.name, info.version.version) == ("io.containerd.kata.v2", katapod.__version__)
    assert info.features.type_url == "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
    features = json.loads(info.features.value)
    assert {"ro", "rro", "rrw", "rnosuid"} <= set(features["mountOptions"])
    assert features["linux"]["mountExtensions"]["idmap"]["enabled"] is False
    assert "SCMP_ACT_NOTIFY" not in features["linux"]["seccomp"]["actions"]
    asked = alone("features")
    assert (asked.returncode, asked.stderr, json.loads(asked.stdout)) == (0, b"", features)


@pytest.mark.parametrize("words", [["start"], ["-id", "x", "start"], ["-id=x", "-namespace=n", "-fly", "start"]])
def test_wrong_words_are_answered_with_the_usage(words: list[str]) -> None:
    done = alone(*words)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"usage: containerd-shim-kata-v2" in done.stderr


def test_help() -> None:
    done = alone("-h")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"usage: ")


def test_a_server_without_its_socket_says_so() -> None:
    """As when a person runs it by hand."""
    done = alone("-id", "x", "-namespace", "n")
    assert done.returncode == 1
    assert b"cannot serve: descriptor 3 is not a listening socket" in done.stderr
    assert os.strerror(errno.EBADF).encode() in done.stderr


def test_annotations_beside_a_spec_of_nothing_else(engine: Engine) -> None:
    """`start` reads no more of config.json than it needs: what is wrong with the rest, Create says."""
    bundle = engine.folder / "c1"
    bundle.mkdir()
    (bundle / "config.json").write_text(json.dumps({"process": 7}))
    assert connect(engine.start(bundle))
