"""Collect what a bug report needs: the parts of kata-collect-data.sh, as text without secrets and of bounded size.

The parts are in the order of Kata's script, then come ours. What fails does not end the collection: it is part of it.
"""

import datetime
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from msgspec import Struct

from katapod import __version__
from katapod.host.logs import read_tail
from katapod.host.process import run
from katapod.host.state import StateStore
from katapod.model.config import CONFIG_PATHS
from katapod.model.errors import KatapodError
from katapod.model.layout import Layout
from katapod.model.plain import LINES, plain
from katapod.observe.check_engines import CONTAINERD_CONFIG, CRIO_CONFIG, CRIO_DROP_INS, find_shim
from katapod.observe.redact import redact, redact_document

__all__ = ["Part", "collect_parts", "render"]

PART_MAX = 128 * 1024  # characters of one part
READ_MAX = 512 * 1024  # bytes read of one file
LINE_MAX = 4096
LIMIT_S = 60.0
SANDBOXES_MAX = 30
PODMAN_LOCKS = Path("/dev/shm/libpod_lock")  # noqa: S108 - Podman's own, made by its first call after a start of the host
CGROUPS_MAX = 200
PROBLEM = re.compile(
    r"\b(error|fail(ed|ure)?|fatal|panic|cannot|could not|unable|missing|no such|denied|refused|timeout|timed out|"
    r"killed|oom|warn(ing)?|abort(ed)?|bug|crash(ed)?|invalid|unexpected(ly)?|not found)\b",
    re.IGNORECASE,
)
IDENTIFIERS = ("kata", "kata-runtime", "containerd-shim-kata-v2", "kata-monitor", "containerd", "crio")
PACKAGES = re.compile(
    r"kata|qemu|virtiofs|user-mode-linux|linux-(image|container)|kernel-|crun|containerd|cri-o|skopeo|umoci|dracut"
)
KERNEL_MESSAGES = re.compile(r"kvm|qemu|virtiofs|vhost|oom|kata|\blinux\[\d", re.IGNORECASE)  # linux: User-mode Linux


class Part(Struct, frozen=True):
    title: str
    items: tuple[tuple[str, str], ...]  # heading and text


async def collect_parts(layout: Layout, problem_limit: int) -> AsyncIterator[Part]:
    """Part by part, redacted. `problem_limit`: lines kept of each log."""
    program = _own_program()
    yield _part("Meta", [("", _meta())])
    yield _part(
        "Runtime",
        [(f"{program} env", await _command([program, "env"])), ("version", await _command([program, "version"]))],
    )
    yield _part("Runtime config files", [("default paths", "\n".join(CONFIG_PATHS)), *_files(_config_files())])
    shim = find_shim()
    yield _part("Containerd shim v2", [(shim, await _command([shim, "--version"]) if shim else "not found")])
    yield _part("Image details", _image(layout))
    yield _part("Logfiles", await _logs(layout, problem_limit))
    yield _part("Container manager", await _managers())
    yield _part("Packages", [("", await _packages())])
    monitor = shutil.which("kata-monitor")
    yield _part("Kata monitor", [("", await _command([monitor, "--version"]) if monitor else "not found")])
    yield _part("Check", [("", await _command([program, "check", "--verbose"]))])
    yield _part("Sandboxes", _sandboxes(layout))
    yield _part("Mounts", _mounts(layout))
    yield _part("Cgroups", [("/proc/self/cgroup", _read("/proc/self/cgroup")), ("of sandboxes", _cgroups())])
    yield _part("Network namespaces", await _namespaces())


def render(parts: Iterable[Part]) -> str:
    """Markdown, each part folded. What a part holds cannot end its block: the fence is longer than any in it."""
    lines = []
    for part in parts:
        lines += ["<details>", f"<summary>{part.title}</summary>", "<p>", ""]
        for heading, text in part.items:
            longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            name = re.sub(r"[^\w ./:@+=,-]", "?", heading)[:200]
            lines += ([f"### {name}", ""] if name else []) + [fence, text, fence, ""]
        lines += ["</p>", "</details>", ""]
    return "\n".join(lines)


def _part(title: str, items: Iterable[tuple[str, str]]) -> Part:
    """Bounded and redacted, whatever it is and wherever it came from."""
    budget = PART_MAX
    kept = []
    for heading, text in items:
        clean = _bounded(redact(plain(text.replace("\r\n", "\n"), keep=LINES)), budget)
        budget -= len(clean)
        kept.append((redact(heading), clean or "(nothing)"))
        if budget <= 0:
            kept.append(("", "(the rest of this part is left out: it is too long)"))
            break
    return Part(title, tuple(kept))


def _bounded(text: str, limit: int) -> str:
    text = "\n".join(line if len(line) <= LINE_MAX else f"{line[:LINE_MAX]} ..." for line in text.rstrip().split("\n"))
    half = max(0, limit) // 2
    if len(text) <= limit:
        return text
    return f"{text[:half]}\n... ({len(text) - 2 * half} characters are left out here) ...\n{text[len(text) - half :]}"


def _own_program() -> str:
    called = shutil.which(sys.argv[0])
    return os.path.realpath(called) if called else shutil.which("kata-runtime") or "kata-runtime"


async def _command(argv: list[str]) -> str:
    """What it prints, or why it does not."""
    try:
        done = await run(argv, timeout_s=LIMIT_S, check=False)
    except KatapodError as exc:
        return str(exc)
    text = done.stdout + (f"\n(standard error)\n{done.stderr}" if done.stderr.strip() else "")
    return text + (f"\n(exit status {done.returncode})" if done.returncode else "")


def _read(path: str | Path) -> str:
    try:
        with open(path, "rb") as handle:
            return handle.read(READ_MAX).decode(errors="replace")
    except OSError as exc:
        return f"cannot read {path}: {exc.strerror}"


def _files(paths: Iterable[str]) -> list[tuple[str, str]]:
    return [(path, _read(path)) for path in paths if os.path.isfile(path)]


def _matching(path: str, pattern: str) -> str:
    return "\n".join(line for line in _read(path).splitlines() if re.search(pattern, line))


def _meta() -> str:
    now = datetime.datetime.now(datetime.UTC)
    system = os.uname()
    release = _matching("/etc/os-release", r"^(PRETTY_NAME|ID|VERSION_ID)=")
    return (
        f"kata-collect-data.sh {__version__}\ndate: {now:%Y-%m-%d %H:%M:%S} UTC\n"
        f"host: {system.sysname} {system.release} {system.version} {system.machine}\n{release}\n"
        "Secrets are left out as far as they are recognized. Read the report before you publish it."
    )


def _config_files() -> list[str]:
    found = []
    for path in CONFIG_PATHS:
        drop_ins = Path(os.path.realpath(path)).parent / "config.d"
        found += [path, *(str(entry) for entry in sorted(drop_ins.glob("*")))]
    return list(dict.fromkeys(found))


def _image(layout: Layout) -> list[tuple[str, str]]:
    root = layout.guest_image_root
    links = [f"{link} -> {os.readlink(link)}" for link in sorted(root.glob("*")) if link.is_symlink()]
    sizes = [
        f"{path}: {path.stat().st_size} bytes" for path in sorted(root.glob("osbuilder-images/*/*")) if path.is_file()
    ]
    manifests = [str(path) for path in sorted(root.glob("osbuilder-images/*/manifest.json"))]
    return [("links", "\n".join([*links, *sizes])), *_files([*manifests, str(layout.proof_file)])]


async def _logs(layout: Layout, limit: int) -> list[tuple[str, str]]:
    items = []
    if shutil.which("journalctl") and any(Path(place).is_dir() for place in ("/run/log/journal", "/var/log/journal")):
        for name in IDENTIFIERS:
            argv = ["journalctl", "--quiet", "--no-pager", "-o", "short-iso", "-n", "20000", "-t", name]
            items.append((f"journal: {name}", _problems(await _command(argv), limit)))
    else:
        items.append(("journal", "there is none here: see the logs of each sandbox below"))
    if shutil.which("dmesg"):
        text = await _command(["dmesg"])
        ours = "\n".join(line for line in text.splitlines() if KERNEL_MESSAGES.search(line))
        items.append(("dmesg", _problems(ours, limit)))
    return items


def _problems(text: str, limit: int) -> str:
    found = [line for line in text.splitlines() if PROBLEM.search(line)]
    return "\n".join(found[-limit:]) if limit else ""


async def _managers() -> list[tuple[str, str]]:
    items = []
    for argv in (
        ["docker", "version"],
        ["docker", "info"],
        ["kubectl", "version", "--client"],
        ["crio", "--version"],
        ["containerd", "--version"],
        ["podman", "--version"],  # "podman version" sets up all that it has
        ["podman", "info"],
    ):
        items.append((" ".join(argv), await _manager(argv)))
    drop_ins = sorted(Path(CRIO_DROP_INS).glob("*")) if Path(CRIO_DROP_INS).is_dir() else []
    files = [CONTAINERD_CONFIG, *map(str, sorted(Path("/etc/containerd/conf.d").glob("*.toml")))]
    files += [CRIO_CONFIG, *map(str, drop_ins), "/etc/containers/containers.conf", "/etc/docker/daemon.json"]
    return [*items, *_files(files)]


async def _manager(argv: list[str]) -> str:
    if not shutil.which(argv[0]):
        return "not installed"
    if argv == ["podman", "info"] and not PODMAN_LOCKS.exists():
        return f"not used since this host was started: asking would make {PODMAN_LOCKS} and more"
    return await _command(argv)


async def _packages() -> str:
    if shutil.which("dpkg-query"):
        text = await _command(["dpkg-query", "-W", "-f", "${db:Status-Abbrev} ${Package} ${Version}\n"])
    elif shutil.which("rpm"):
        text = await _command(["rpm", "-qa"])
    else:
        return "neither dpkg nor rpm"
    return "\n".join(line for line in sorted(text.splitlines()) if PACKAGES.search(line))


def _sandboxes(layout: Layout) -> list[tuple[str, str]]:
    items = []
    found = layout.state_root.glob("*") if layout.state_root.is_dir() else ()
    directories = sorted(each for each in found if each.is_dir())
    for directory in directories[:SANDBOXES_MAX]:
        paths = layout.sandbox(directory.name)
        items.append((f"{directory.name}: record", _document(paths.persist)))
        items.append((f"{directory.name}: devices", _document(paths.devices)))
        disk_log = paths.state / "disks.log"  # of qemu-storage-daemon, for User-mode Linux
        for log in (paths.console_log, paths.vmm_log, paths.state / "virtiofsd.log", disk_log):
            if log == disk_log and not log.exists():
                continue
            try:
                items.append((f"{directory.name}: {log.name}", read_tail(log, max_bytes=16384, max_lines=60)))
            except OSError as exc:
                items.append((f"{directory.name}: {log.name}", f"cannot be read: {exc.strerror}"))
    if len(directories) > SANDBOXES_MAX:
        items.append(("", f"{len(directories) - SANDBOXES_MAX} more are left out"))
    return items


def _mounts(layout: Layout) -> list[tuple[str, str]]:
    """The host's, and those that each supervisor has for itself."""
    items = [("", _matching("/proc/self/mountinfo", r"kata|/run/vc"))]
    for record in itertools.islice(StateStore(layout).records(), SANDBOXES_MAX):
        supervisor = f"/proc/{record.supervisor_pid}/mountinfo"
        items.append((f"{record.sandbox_id}: {supervisor}", _matching(supervisor, r"kata|/run/vc")))
    return items


def _document(path: Path) -> str:
    """A JSON file of ours, without environments; text that is no JSON is not shown, since nothing is known of it."""
    text = _read(path)
    try:
        return json.dumps(redact_document(json.loads(text)), indent=2)
    except (ValueError, RecursionError):
        return text if text.startswith("cannot read") else f"{len(text)} characters that are no JSON"


def _cgroups() -> str:
    found: list[str] = []
    for place, names, _ in os.walk("/sys/fs/cgroup"):
        found += [os.path.join(place, name) for name in names if "kata" in name]
        if len(found) >= CGROUPS_MAX:
            break
    return "\n".join(found[:CGROUPS_MAX])


async def _namespaces() -> list[tuple[str, str]]:
    items = []
    for argv in (["ip", "-br", "link"], ["ip", "netns", "list"], ["lsns", "-t", "net", "-o", "NS,NPROCS,PID,NSFS"]):
        items.append((" ".join(argv), await _command(argv) if shutil.which(argv[0]) else "not installed"))
    return items
