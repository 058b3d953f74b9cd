"""containerd and CRI-O on this machine: what is installed, and which of their handlers lead to our shim."""

import glob
import os
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from katapod.host.process import run
from katapod.model.errors import KatapodError
from katapod.observe.check_facts import EngineFacts, ProgramFacts

__all__ = ["collect_engines", "find_shim"]

SHIM = "containerd-shim-kata-v2"
RUNTIME_TYPE = "io.containerd.kata.v2"
ENGINE_DIRS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CONTAINERD_CONFIG = "/etc/containerd/config.toml"
CRIO_CONFIG, CRIO_DROP_INS = "/etc/crio/crio.conf", "/etc/crio/crio.conf.d"
IMPORTS_MAX = 50
LIMIT_S = 10.0


def find_shim() -> str:
    """Where engines find the shim: systemd's PATH for services. Ours counts too; empty if nowhere."""
    return shutil.which(SHIM, path=os.pathsep.join((os.environ.get("PATH", ""), ENGINE_DIRS))) or ""


async def collect_engines() -> tuple[EngineFacts, ...]:
    return (await _containerd(), await _crio())


async def _program(name: str) -> ProgramFacts:
    path = shutil.which(name) or ""
    if not path:
        return ProgramFacts(name, "", found=False)
    try:
        said = (await run([path, "--version"], timeout_s=LIMIT_S, check=False)).stdout
    except KatapodError as exc:
        said = str(exc)
    return ProgramFacts(name, path, found=True, version=(said.splitlines() or [""])[0][:120])


async def _containerd() -> EngineFacts:
    program = await _program("containerd")
    handlers: list[str] = []
    files: list[str] = []
    problem = ""
    queue = [CONTAINERD_CONFIG] if os.path.exists(CONTAINERD_CONFIG) else []
    while queue and len(files) < IMPORTS_MAX:
        name = queue.pop(0)
        files.append(name)
        content, error = _read_toml(name)
        problem = problem or error
        handlers += [key for key, value in _runtimes(content) if _is_ours(value)]
        for pattern in _strings(content.get("imports")):
            found = sorted(glob.glob(os.path.join(os.path.dirname(name), pattern)))
            queue += [path for path in found if path not in files]
    return EngineFacts("containerd", program, tuple(dict.fromkeys(handlers)), tuple(files), problem)


async def _crio() -> EngineFacts:
    program = await _program("crio")
    handlers: list[str] = []
    problem = ""
    drop_ins = sorted(Path(CRIO_DROP_INS).glob("*")) if Path(CRIO_DROP_INS).is_dir() else []
    files = [name for name in (CRIO_CONFIG, *map(str, drop_ins)) if os.path.isfile(name)]
    for name in files:
        content, error = _read_toml(name)
        problem = problem or error
        runtimes = _table(_table(_table(content, "crio"), "runtime"), "runtimes")
        for key, value in runtimes.items():
            if isinstance(value, dict) and str(value.get("runtime_path", "")).endswith(f"/{SHIM}"):
                handlers.append(key)
    return EngineFacts("crio", program, tuple(dict.fromkeys(handlers)), tuple(files), problem)


def _read_toml(name: str) -> tuple[dict[str, Any], str]:
    try:
        return tomllib.loads(Path(name).read_text()), ""
    except OSError as exc:
        return {}, f"cannot read {name}: {exc.strerror}"
    except ValueError as exc:
        return {}, f"cannot read {name}: {exc}"


def _runtimes(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """containerd's handlers, in whichever plugin the version of its configuration has them."""
    for plugin in _table(content, "plugins").values():
        if isinstance(plugin, dict):
            yield from _table(_table(plugin, "containerd"), "runtimes").items()


def _is_ours(runtime: Any) -> bool:
    if not isinstance(runtime, dict):
        return False
    return runtime.get("runtime_type") == RUNTIME_TYPE or str(runtime.get("runtime_path", "")).endswith(f"/{SHIM}")


def _table(parent: dict[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    return value if isinstance(value, dict) else {}


def _strings(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
