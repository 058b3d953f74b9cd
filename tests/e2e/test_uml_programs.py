"""Programs under User-mode Linux do what they do on the host: the same output, byte for byte.

Its kernel does by ptrace(2) what a processor does for others: signals, registers and shared memory are what to look at.
"""

import shutil
import sqlite3
import subprocess
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from faults import die_hard, vmm_of

from katapod.model.flavour import initrd_link
from kit.kata import Kata, wait_for

DISK = Path("/var/cache/kata-containers") / initrd_link("agent", "uml")
PYTHON = shutil.which("python3", path="/usr/local/bin:/usr/bin") or "/usr/bin/python3"

pytestmark = pytest.mark.skipif(not DISK.exists(), reason="needs a guest image for User-mode Linux: image build")

# Doubles are computed in vector registers, which each signal has to give back.
FLOATS = """
import hashlib, math, os, signal, sys
def work(number):
    ticks = 0
    def tick(*_):
        nonlocal ticks
        ticks += math.sqrt(ticks + 1) > 0
    signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
    digest, done = hashlib.sha256(), 0
    while done < 20 or ticks < 100:
        values = [math.sin(i + number) * math.exp(i / 300) for i in range(2000)]
        digest.update(repr(values).encode()) if done < 20 else None
        done += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    return digest.hexdigest()
for number in range(4):
    if os.fork() == 0:
        os.write(1, f"{number} {work(number)}\\n".encode())
        os._exit(0)
print([os.wait()[1] for _ in range(4)])
"""

THREADS = """
import hashlib, threading, time
digests, together = [""] * 200, threading.Barrier(200)
def work(number):
    together.wait()
    digest = hashlib.sha256(b"%d" % number)
    for _ in range(5):
        digest.update(digest.digest())
        time.sleep(0)
    digests[number] = digest.hexdigest()
threads = [threading.Thread(target=work, args=(number,)) for number in range(200)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(hashlib.sha256("".join(digests).encode()).hexdigest())
"""

# The log's index is memory that two processes share, and locks are taken on bytes of it.
DATABASE = """
import os, sqlite3, sys, tempfile
name = tempfile.mkdtemp(dir=sys.argv[1]) + "/test.db"
database = sqlite3.connect(name)
print(database.execute("pragma journal_mode=wal").fetchone(), database.execute("create table t(a, b)").fetchall())
database.close()
for writer in (1, 2):
    if os.fork() == 0:
        database = sqlite3.connect(name, timeout=60, isolation_level=None)
        for i in range(30):
            database.execute("begin immediate")
            database.execute("insert into t values(?, ?)", (writer, i))
            database.execute("commit")
        os._exit(0)
print([os.wait()[1] for _ in range(2)])
database = sqlite3.connect(name)
print(database.execute("select a, count(*), sum(b) from t group by a order by a").fetchall())
print(database.execute("pragma integrity_check").fetchall())
"""

TRACING = """
import ctypes, os, signal
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
TRACEME, CONT, SINGLESTEP, SYSCALL, SETOPTIONS, TRACESYSGOOD = 0, 7, 9, 24, 0x4200, 1
child = os.fork()
if child == 0:
    libc.ptrace(TRACEME, 0, None, None)
    os.kill(os.getpid(), signal.SIGSTOP)
    for _ in range(5):
        os.getppid()
    os._exit(5)
print(os.WSTOPSIG(os.waitpid(child, 0)[1]), libc.ptrace(SETOPTIONS, child, None, TRACESYSGOOD))
stops = set()
for _ in range(4):
    libc.ptrace(SYSCALL, child, None, None)
    stops.add(os.WSTOPSIG(os.waitpid(child, 0)[1]))
for _ in range(200):
    libc.ptrace(SINGLESTEP, child, None, None)
    stops.add(os.WSTOPSIG(os.waitpid(child, 0)[1]))
libc.ptrace(CONT, child, None, None)
print(sorted(stops), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

# Errors for getppid(2), as <linux/filter.h> and <linux/seccomp.h> write it: load the number, compare, return.
FILTER = """
import ctypes, os, struct
steps = ((0x20, 0, 0, 0), (0x15, 0, 1, 110), (0x06, 0, 0, 0x50000 | 77), (0x06, 0, 0, 0x7FFF0000))
code = b"".join(struct.pack("=HBBI", *step) for step in steps)
libc, held = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(code)
program = ctypes.create_string_buffer(struct.pack("@HP", 4, ctypes.addressof(held)))
print(libc.prctl(38, 1, 0, 0, 0), libc.prctl(22, 2, program, 0, 0))
print(libc.syscall(110), ctypes.get_errno(), os.getpid() > 0)
"""

WATCHING = """
import ctypes, os, struct, sys, tempfile
libc, folder = ctypes.CDLL(None, use_errno=True), tempfile.mkdtemp(dir=sys.argv[1])
watch = libc.inotify_init1(os.O_NONBLOCK)
libc.inotify_add_watch(watch, folder.encode(), 0xFFF)
open(folder + "/a", "w").write("x")
os.rename(folder + "/a", folder + "/b")
os.unlink(folder + "/b")
data, at = os.read(watch, 1 << 16), 0
while at < len(data):
    _, mask, _, length = struct.unpack_from("iIII", data, at)
    print(hex(mask), data[at + 16 : at + 16 + length].rstrip(bytes(1)))
    at += 16 + length
"""

# Says a number once it is committed.
COMMITS = """
import itertools, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("pragma journal_mode=" + sys.argv[2])
database.execute("pragma synchronous=full")
database.execute("create table t(number, filling)")
for number in itertools.count():
    database.execute("insert into t values(?, zeroblob(3000))", (number,))
    print(number, flush=True)
"""

PROGRAMS = {
    "floats": FLOATS,
    "threads": THREADS,
    "database": DATABASE,
    "tracing": TRACING,
    "filter": FILTER,
    "watching": WATCHING,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The flags of a container with the host's programs."""
    root = tmp_path_factory.mktemp("root")
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / name).symlink_to(f"usr/{name}")
    for name in ("usr", "tmp", "run"):
        (root / name).mkdir()
    return ("--accel", "uml", "--net", "none", "-v", "/usr:/usr:ro", "--rootfs", str(root))


@pytest.fixture(scope="module")
def box(module_kata: Kata, root: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> str:
    shared = ("-v", f"{tmp_path_factory.mktemp('shared')}:/shared")
    return module_kata.start("--cap-add", "SYS_PTRACE", *shared, "--tmpfs", "/memory", *root, "sleep", "1000")


@pytest.mark.parametrize("place", ["/tmp", "/memory", "/shared"])  # its layer, memory, the host's directory
@pytest.mark.parametrize("name", ["database", "watching"])
def test_files_are_as_on_the_host(kata: Kata, box: str, name: str, place: str, tmp_path: Path) -> None:
    assert kata.ok("exec", box, PYTHON, "-c", PROGRAMS[name], place) == on_host(PROGRAMS[name], str(tmp_path))


@pytest.mark.parametrize("name", ["floats", "threads", "tracing", "filter"])
def test_processes_are_as_on_the_host(kata: Kata, box: str, name: str) -> None:
    made = kata.ok("exec", box, PYTHON, "-c", PROGRAMS[name])
    assert sorted(made.splitlines()) == sorted(on_host(PROGRAMS[name]).splitlines())


def test_commits_outlive_their_machine(kata: Kata, root: tuple[str, ...], tmp_path: Path) -> None:
    """A volume keeps what a database has said to be committed, wherever the guest's kernel is killed."""
    box = kata.start("-v", f"{tmp_path}:/data", *root, "sleep", "1000")
    told: dict[str, bytes] = {}
    with ExitStack() as stack:
        writers = {
            mode: stack.enter_context(
                kata.spawn("exec", box, PYTHON, "-c", COMMITS, f"/data/{mode}", mode, stdout=subprocess.PIPE)
            )
            for mode in ("wal", "delete")
        }
        for mode, writer in writers.items():
            assert writer.stdout
            told[mode] = b"".join(writer.stdout.readline() for _ in range(15))
        die_hard(vmm_of(box))
        for mode, writer in writers.items():
            told[mode] += writer.communicate(timeout=180)[0]
    wait_for(lambda: kata.listed(box)["state"] == "stopped", "nobody writes any more")
    for mode, lines in told.items():
        with closing(sqlite3.connect(tmp_path / mode)) as database:
            assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
            kept = [number for (number,) in database.execute("select number from t order by number")]
        assert kept == list(range(len(kept)))
        assert 15 <= lines.count(b"\n") <= len(kept)


@pytest.mark.parametrize("command", [("vmstat",), ("ps", "-ef")])
def test_procps_finds_the_processors(kata: Kata, box: str, command: tuple[str, ...]) -> None:
    """It fails where /proc/cpuinfo ends as that kernel ends it."""
    if not shutil.which(command[0]):
        pytest.skip(f"the host has no {command[0]}")
    assert len(kata.ok("exec", box, *command).splitlines()) > 1
    assert kata.ok("exec", box, "tail", "-c", "2", "/proc/cpuinfo") == "\n\n"


def test_cpuinfo_names_the_features_of_the_processor(kata: Kata, box: str) -> None:
    """Programs look there for AVX; what a kernel has to allow first, as AMX, is not for them."""
    looked_for = {"fpu", "cx16", "sse2", "sse4_2", "avx", "avx2", "avx512f", "aes", "fma", "f16c", "rdrand"}
    inside = _features(kata.ok("exec", box, "cat", "/proc/cpuinfo"))
    assert inside & looked_for == _features(Path("/proc/cpuinfo").read_text()) & looked_for
    assert inside & {"amx_tile", "pku", "vmx", "svm"} == set()


def test_a_privileged_container_has_nat_and_no_dead_consoles(kata: Kata, root: tuple[str, ...]) -> None:
    """Address translation is there by iptables-legacy, as an engine in the guest needs it.

    A console that nobody can open makes systemd start a getty there again and again, and count itself degraded.
    """
    if not shutil.which("iptables-legacy", path="/usr/sbin"):
        pytest.skip("the host has no iptables-legacy")
    rule = "-A POSTROUTING -s 10.88.0.0/16 -j MASQUERADE"
    script = f"iptables-legacy -t nat {rule}; iptables-legacy -t nat -S POSTROUTING; cd /dev; echo tty[0-9]* ptmx"
    done = kata.run("--privileged", *root, "sh", "-c", script)
    assert (done.code, done.stdout) == (0, f"-P POSTROUTING ACCEPT\n{rule}\ntty[0-9]* ptmx\n"), done.stderr


def _features(cpuinfo: str) -> set[str]:
    return {word for line in cpuinfo.splitlines() if line.startswith("flags") for word in line.split()[2:]}


def on_host(program: str, *args: str) -> str:
    done = subprocess.run([PYTHON, "-c", program, *args], capture_output=True, text=True, timeout=180, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
