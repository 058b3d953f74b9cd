"""Breaking things on purpose: run `kata-runtime` beside the test, wait for a moment of a start, kill, look what stays.

Moments are seen from outside (records and files on disk, command lines of processes), never guessed by sleeping.
The look for leftovers is an independent one: it shares no code with what removes them.
"""

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kit.kata import KATA, RUN_PREFIX
from kit.templates import kata_command, templates_are_on

__all__ = [
    "KATA",
    "LIMIT_S",
    "STATE",
    "Finished",
    "Started",
    "console_of",
    "container_state",
    "delete",
    "die_hard",
    "fresh_name",
    "kata",
    "leftovers",
    "processes_of",
    "vmm_of",
    "record_of",
    "start",
    "start_exec",
    "SHARED",
    "virtiofsd_of",
    "wait_until",
    "write_config",
]

STATE = Path("/run/vc/sbs")
ROOTS = (STATE, Path("/run/vc/vm"), Path("/run/kata-containers/shared/sandboxes"), Path("/var/lib/katapod/sandboxes"))
REFS = Path("/var/lib/katapod/images/refs")
LIMIT_S = 240.0


@dataclass(frozen=True, slots=True)
class Finished:
    code: int
    out: str
    err: str
    took_s: float

    def assert_clean_error(self, code: int = 125) -> "Finished":
        """It failed with `code`, in words for people."""
        assert self.code == code, self
        assert self.err.startswith("kata-runtime: "), self.err
        assert "Traceback" not in self.err, self.err
        assert "internal error" not in self.err, self.err
        assert "Error(" not in self.err, self.err
        return self


class Started:
    """A `kata-runtime` that runs beside the test."""

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self.process = process
        self.name = name
        self.began = time.monotonic()

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def signal_is_taken(self, number: int) -> None:
        """Wait until a signal was delivered: one that is sent while another of its kind is pending is lost."""
        wait_until(f"it takes signal {number}", lambda: not self._pending() >> (number - 1) & 1)

    def _pending(self) -> int:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found = re.findall(
                r"^(?:SigPnd|ShdPnd):\t(\w+)$", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE
            )
            return int(found[0], 16) | int(found[1], 16)
        return 0

    def end(self, limit_s: float = LIMIT_S) -> Finished:
        """Wait for its end. Fails when it does not end in time."""
        since = time.monotonic()
        out, err = self.process.communicate(timeout=limit_s)
        return Finished(self.process.returncode, out, err, time.monotonic() - since)


def fresh_name(what: str = "f") -> str:
    return f"{RUN_PREFIX}{what}-{secrets.token_hex(5)}"


def kata(
    *args: str, input: str | None = None, limit_s: float = LIMIT_S, env: Mapping[str, str] | None = None
) -> Finished:
    began = time.monotonic()
    done = subprocess.run(
        kata_command(*args),
        input=input,
        stdin=subprocess.DEVNULL if input is None else None,
        capture_output=True,
        text=True,
        timeout=limit_s,
        env={**os.environ, **(env or {})},
        errors="replace",
    )
    return Finished(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


def _popen(argv: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


@contextlib.contextmanager
def start(*args: str, name: str, config: Path | None = None, prefix: tuple[str, ...] = ()) -> Iterator[Started]:
    """`kata-runtime run --name NAME ARGS` beside us. At the end nothing of it stays, whatever the test did."""
    before = ["--config", str(config)] if config else []
    process = _popen([*prefix, *kata_command(*before), "run", "--name", name, *args])
    try:
        yield Started(process, name)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
        if leftovers(name):
            delete(name)


@contextlib.contextmanager
def start_exec(name: str, *command: str) -> Iterator[Started]:
    """`kata-runtime exec NAME COMMAND` beside us."""
    process = _popen(kata_command("exec", name, *command))
    try:
        yield Started(process, name)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def delete(name: str) -> Finished:
    return kata("delete", "--force", name, limit_s=180)


def record_of(name: str) -> dict[str, object]:
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, object] = json.loads((STATE / name / "persist.json").read_text())
        return found
    return {}


def container_state(name: str) -> str:
    containers = record_of(name).get("containers")
    return str(containers[0]["state"]) if isinstance(containers, list) and containers else ""


def console_of(name: str) -> str:
    with contextlib.suppress(OSError):
        return (STATE / name / "console.log").read_text(errors="replace")
    return ""


def processes_of(name: str, program: str = "") -> list[int]:
    """Processes whose command line names the sandbox, other than `kata-runtime` itself; dead ones are not counted."""
    found = []
    word = re.compile(rf"(?<![\w.-]){re.escape(name)}(?![\w-])")
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            argv = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace")
            if (
                not argv
                or "kata-runtime" in argv
                or not word.search(argv)
                or program not in os.path.basename(argv.split("\0")[0])
            ):
                continue
            if Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(entry))
    return sorted(found)


def vmm_of(name: str) -> int:
    """The VMM's process id; 0 while there is none. A kernel of User-mode Linux is process 1 of its PID namespace."""
    return next(iter(processes_of(name, "qemu-system") or filter(_is_uml_kernel, processes_of(name))), 0)


def _is_uml_kernel(pid: int) -> bool:
    with contextlib.suppress(OSError):
        first = Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"linux.uml ")
        return first and bool(re.search(r"^NSpid:.*\t1$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
    return False


SHARED = ("-v", "/usr/share:/shared:ro")
"""Flags of `run` with which there is a virtiofsd."""


def virtiofsd_of(name: str) -> list[int]:
    """virtiofsd and its child in the sandbox, the parent first."""
    found = processes_of(name, "virtiofsd")
    return sorted(found, key=lambda pid: _parent(pid) in found)


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def wait_until(what: str, seen: Callable[[], object], limit_s: float = 180.0, period_s: float = 0.02) -> float:
    """Wait for something to be seen; returns the seconds. Fails with `what` when the time runs out.

    Half of the time at least is left to what is waited for: a look through all processes takes longer than the period.
    """
    began = looked = time.monotonic()
    while not seen():
        now = time.monotonic()
        assert now - began < limit_s, f"not seen within {limit_s:g} s: {what}"
        time.sleep(max(period_s, now - looked))
        looked = time.monotonic()
    return time.monotonic() - began


CGROUPS = "/sys/fs/cgroup"


def leftovers(name: str) -> list[str]:
    """What is there of a sandbox: processes, mounts, directories, sockets, image holds, cgroups, network interfaces."""
    found = [f"process {pid}" for pid in processes_of(name)]
    found += [f"directory {root / name}" for root in ROOTS if (root / name).exists()]
    found += [f"staged {path}" for path in STATE.glob(f".*{name}*")] if STATE.exists() else []
    found += [f"mount {line.split()[4]}" for line in _lines("/proc/self/mountinfo") if name in line]
    found += [f"socket {line.split()[-1]}" for line in _lines("/proc/net/unix") if name in line]
    # os.walk, unlike glob, passes over what goes away meanwhile
    found += [
        f"cgroup {folder}/{child}" for folder, children, _ in os.walk(CGROUPS) for child in children if name in child
    ]
    found += [f"interface {path.name}" for path in Path("/sys/class/net").iterdir() if name[:11] in path.name]
    for folder, children, files in os.walk(REFS):
        holds = [Path(folder, child) for child in (*children, *files)]
        found += [f"image hold {path}" for path in holds if name in path.name or _mentions(path, name)]
    return found


def wait_nothing_left(*names: str, limit_s: float = 180.0) -> None:
    """For sandboxes of containerd: it runs a shim's `delete` beside what it is asked for, also after a proper end."""
    deadline = time.monotonic() + limit_s
    while found := [line for name in names for line in leftovers(name)]:
        assert time.monotonic() < deadline, f"after {limit_s:g} s there is still {found}"
        time.sleep(0.05)


def _mentions(path: Path, name: str) -> bool:
    with contextlib.suppress(OSError):
        return path.is_file() and name in path.read_text(errors="replace")
    return False


def _lines(path: str) -> list[str]:
    return Path(path).read_text(errors="replace").splitlines()


def write_config(directory: Path, **tables: Mapping[str, object]) -> Path:
    """A configuration file: write_config(tmp, qemu={"path": "/x"}, agent={"dial_timeout": 5}).

    Without a word about templates it has them on or off as the test run has (kit.templates).
    """
    headings = {"qemu": "hypervisor.qemu", "agent": "agent.kata"}
    if not templates_are_on():
        tables["factory"] = {"enable_template": False, **tables.get("factory", {})}
    path = directory / f"{secrets.token_hex(4)}.toml"
    text = ""
    for table, keys in tables.items():
        text += f"[{headings.get(table, table)}]\n" + "".join(
            f"{key} = {json.dumps(value)}\n" for key, value in keys.items()
        )
    path.write_text(text)
    return path


def die_hard(pid: int) -> float:
    """SIGKILL; returns when."""
    assert pid, "there is such a process"  # 0 would be all of us
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()
