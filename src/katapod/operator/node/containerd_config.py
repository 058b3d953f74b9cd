"""containerd's configuration file with our runtime handlers in it, and without: pure, and the one undoes the other.

The handlers are a block of tables at the end of the main file. containerd 1.x replaces a whole plugin's section by an
import's, so that a file of our own in an imported directory would take the administrator's settings of the CRI away.
Nor does it keep its built-in handler, runc, beside the first one that is configured: without it the CRI does not start.
Source: containerd 1.6, services/server/config (mergeConfig); docs/cri/config.md for versions 2 and 3.
"""

import tomllib
from collections.abc import Mapping
from typing import Any

from katapod.operator.node.errors import NodeError

__all__ = ["configured_handler", "with_handlers", "without_handler"]

BEGIN = "# BEGIN katapod: written and removed by kata-node"
END = "# END katapod\n"
CREATED = " (with the file)"
ENDED = " (with the end of the line before)"
PLUGINS = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}
"""Version of the file: the plugin with the runtime handlers."""

TABLE = """[plugins."{plugin}".containerd.runtimes.{handler}]
{shim}
# a privileged container gets all rights inside its VM, and no device of the host
privileged_without_host_devices = true
pod_annotations = ["io.katacontainers.*"]
container_annotations = ["io.katacontainers.*"]
"""
SHIMS = {
    2: 'runtime_type = "{path}"',  # containerd 1.6 does not heed a runtime_path when it starts a pod's sandbox
    3: 'runtime_type = "io.containerd.kata.v2"\nruntime_path = "{path}"',
}
BUILT_IN = "runc"
DEFAULT = """[plugins."{plugin}".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"""
OPTIONS = """[plugins."{plugin}".containerd.runtimes.{handler}.options]
ConfigPath = "{config}"
"""


def with_handlers(text: str | None, handlers: Mapping[str, str], shim: str) -> str:
    """The file's text with the handlers, each with the path of its configuration.toml, or empty for the default one;
    `text` is None where there is no file. Replaces a block of before.

    Raises NodeError for a file that containerd would not read so.
    """
    before = without_handler(text) if text is not None else None
    version = _version(before)
    mark, head = "", ""
    if before is None:
        mark, head = CREATED, f"version = {version}\n"
    elif before and not before.endswith("\n"):
        mark, head = ENDED, ""
    there = set(_handlers(before or "", version))
    if taken := sorted(set(handlers) & (there or {BUILT_IN})):
        raise NodeError(f"the runtime handler {taken[0]} is configured already, and not by us: remove it from the file")
    tables = "" if there else DEFAULT.format(plugin=PLUGINS[version])
    started = SHIMS[version].format(path=shim)
    tables += "".join(_table(PLUGINS[version], name, config, started) for name, config in handlers.items())
    after = (before or "") + ("\n" if mark == ENDED else "") + f"{BEGIN}{mark}\n{head}{tables}{END}"
    try:
        if not set(handlers) <= set(_handlers(after, version)):
            raise NodeError("its tables of runtime handlers are written so that none can be added at its end")
    except tomllib.TOMLDecodeError as exc:
        raise NodeError(f"no table can be added at its end: {exc}; its [plugins] may be an inline table") from exc
    return after


def _table(plugin: str, handler: str, config: str, shim: str) -> str:
    options = OPTIONS.format(plugin=plugin, handler=handler, config=config) if config else ""
    return TABLE.format(plugin=plugin, handler=handler, shim=shim) + options


def without_handler(text: str) -> str | None:
    """The text without our block, byte for byte as it was before; None if the file came with it."""
    start = text.find(BEGIN)
    if start < 0:
        return text
    stop = text.find(END, start)
    if stop < 0:
        raise NodeError(f"the line {END.strip()!r} is missing: remove the block that begins with {BEGIN!r} by hand")
    mark = text[start + len(BEGIN) : text.index("\n", start)]
    before, after = text[:start], text[stop + len(END) :]
    if mark == CREATED and not before.strip() and not after.strip():
        return None
    if mark == ENDED and not after:  # else somebody has gone on below the block
        before = before.removesuffix("\n")
    return before + after


def configured_handler(text: str | None) -> bool:
    """Whether our block is there."""
    return text is not None and BEGIN in text


def _version(text: str | None) -> int:
    if text is None:
        return 2  # what containerd 1.x and 2.x read
    try:
        found = tomllib.loads(text).get("version", 1)
    except tomllib.TOMLDecodeError as exc:
        raise NodeError(f"it is not TOML: {exc}") from exc
    if found not in PLUGINS:
        raise NodeError(
            f"its version is {found}, but {' or '.join(map(str, PLUGINS))} is needed: `containerd config migrate`"
        )
    return int(found)


def _handlers(text: str, version: int) -> dict[str, Any]:
    found: Any = tomllib.loads(text)
    for key in ("plugins", PLUGINS[version], "containerd", "runtimes"):
        found = found.get(key, {}) if isinstance(found, dict) else {}
    return found if isinstance(found, dict) else {}
