"""Runtime handlers with drop-ins: each has a configuration.toml of its own, /opt/katapod/handlers/NAME.

    configuration.toml        the node's, as it was when this was written: /etc's, else the payload's; or empty
    config.d/FILE.toml        the node's drop-ins
    config.d/zz-katapod-N.toml  what the KataConfig says, which goes before

A new sandbox reads them when it starts; those that run are left as they are.
"""

import contextlib
from collections.abc import Mapping, Sequence

from katapod.model.config import CONFIG_PATHS, parse_config
from katapod.model.errors import ConfigError
from katapod.operator.handlers import HandlerSpec
from katapod.operator.node.errors import NodeError
from katapod.operator.node.host import Host
from katapod.operator.node.payload import HANDLERS, HOME, payload_path

__all__ = ["config_of", "config_paths", "planned_files", "read_files", "write_files"]

FOLDER = f"{HOME}/{HANDLERS}"


def config_of(handler: HandlerSpec) -> str:
    """The path of its configuration.toml; empty if it has the node's."""
    return f"{FOLDER}/{handler.name}/configuration.toml" if handler.drop_ins else ""


def config_paths(host: Host, handlers: Sequence[HandlerSpec]) -> dict[str, str]:
    """By handler, as config_of; one that is kept has what is there."""
    return {one.name: _kept(host, one) if one.kept else config_of(one) for one in handlers}


def _kept(host: Host, handler: HandlerSpec) -> str:
    path = f"{FOLDER}/{handler.name}/configuration.toml"
    return path if host.path(path).exists() else ""


def planned_files(host: Host, target: str, handlers: Sequence[HandlerSpec]) -> dict[str, str]:
    """Paths and texts of all files. Raises NodeError if one cannot be used, with the key."""
    kept = tuple(f"{FOLDER}/{one.name}/" for one in handlers if one.kept)
    found = {path: text for path, text in read_files(host).items() if path.startswith(kept)} if kept else {}
    for handler in handlers:
        if not (config := config_of(handler)):
            continue
        base, drop_ins = _of_node(host, target)
        folder = f"{FOLDER}/{handler.name}/config.d"
        own = {f"zz-katapod-{index}.toml": text for index, text in enumerate(handler.drop_ins)}
        files = {f"{folder}/{name}": text for name, text in {**drop_ins, **own}.items()}
        try:
            parse_config(base.encode(), config, [(path, files[path].encode()) for path in sorted(files)])
        except ConfigError as exc:
            raise NodeError(f"the handler {handler.name} cannot have this configuration: {exc}") from exc
        found |= {config: base, **files}
    return found


def _of_node(host: Host, target: str) -> tuple[str, dict[str, str]]:
    """The configuration that a sandbox of this payload would have without us: the file, and its drop-ins by name."""
    etc, shared = CONFIG_PATHS
    for path in (etc, f"{payload_path(target)}/rootfs{shared}"):
        if (base := host.read(path)) is not None:
            folder = host.path(path).resolve().parent / "config.d"
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return base, {one.name: one.read_text() for one in sorted(folder.iterdir()) if one.is_file()}
            return base, {}
    return "", {}


def read_files(host: Host) -> dict[str, str]:
    """Those that are there."""
    folder = host.path(FOLDER)
    return {f"/{one.relative_to(host.root)}": one.read_text() for one in sorted(folder.rglob("*")) if one.is_file()}


def write_files(host: Host, files: Mapping[str, str]) -> None:
    """These and no others: each is replaced at once, and those that are left over go last."""
    there = read_files(host)
    for path, text in files.items():
        if there.get(path) != text:
            host.write(path, text)
    for path in there.keys() - files.keys():
        host.write(path, None)
    for folder in sorted(host.path(FOLDER).rglob("*"), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    with contextlib.suppress(OSError):  # there are some, or there is none
        host.path(FOLDER).rmdir()
