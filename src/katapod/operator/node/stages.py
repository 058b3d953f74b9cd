"""The stages of a node's installation, and of its removal. Each can be repeated; one that fails undoes what it did.

    host      the node and its engine are what we can work with
    payload   /opt/katapod/TARGET
    image     the guest's kernel and image, below /var/cache/kata-containers: copied, or built; tried by a boot
    engine    the runtime handlers in the engine's configuration, and the engine started again
    proof     a sandbox by the engine for each configuration; what it takes, where that is to be measured

What there was before us is noted in /opt/katapod/node.json, so that removal takes away what we have made and no more.
"""

import contextlib
import logging
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from katapod.operator.handlers import NodeSettings
from katapod.operator.node.containerd_config import configured_handler, with_handlers, without_handler
from katapod.operator.node.engine import DEFAULT_SOCKET, Engine, find_engine, restart_engine
from katapod.operator.node.errors import NodeError, StageFailed
from katapod.operator.node.handler_files import config_of, config_paths, planned_files, read_files, write_files
from katapod.operator.node.host import Host
from katapod.operator.node.payload import (
    HOME,
    SHIM,
    copy_images,
    install_payload,
    payload_path,
    payloads,
    remove_payload,
    users_of,
)
from katapod.operator.node.proof import accelerator_of, measure, prove
from katapod.operator.report import Report

__all__ = ["install", "uninstall"]

log = logging.getLogger(__name__)

NOTES = f"{HOME}/node.json"
OURS = ("/var/cache/kata-containers", "/var/lib/katapod", "/run/vc", "/run/katapod")
"""Directories that Katapod makes on a host; those that were there before us stay."""
OPT = "/opt"
IMAGE_LIMIT_S = 900.0


class Notes(msgspec.Struct, frozen=True):
    """What there was before the first installation."""

    kept: tuple[str, ...]  # of OURS and /opt: directories with something in them, which stay as they are
    empty: tuple[str, ...]  # directories with nothing in them, which are emptied


def install(
    host: Host,
    source: Path,
    target: str,
    *,
    accelerators: tuple[str, ...],
    settings: NodeSettings,
    socket_path: str = DEFAULT_SOCKET,
) -> Report:
    """Bring the node to `target`. Raises StageFailed, with the node as it was before."""
    with contextlib.ExitStack() as undo:
        with _stage("host"):
            if platform.machine() != "x86_64":
                raise NodeError(f"this node is {platform.machine()}; Katapod runs on x86_64")
            engine = find_engine(host, socket_path)
            old = host.read(engine.config)
            configs = config_paths(host, settings.handlers)
            new = with_handlers(old, configs, f"{payload_path(target)}/bin/{SHIM}")
        with _stage("payload"):
            noted = _note(host)
            if noted:
                undo.callback(_quietly, lambda: _remove_ours(host))
            if install_payload(host, source, target):
                undo.callback(_quietly, lambda: remove_payload(host, target))
        with _stage("image"):
            copy_images(host, source)
            runtime = f"{payload_path(target)}/bin/kata-runtime"
            host.run(runtime, "image", "build", limit_s=IMAGE_LIMIT_S)  # nothing, if those are for this payload
            accelerator, why = accelerator_of(host, target)
            if accelerator not in accelerators:
                raise NodeError(
                    f"VMs run by {accelerator} here {why}, and spec.accelerators has {', '.join(accelerators)}"
                )
        with _stage("engine"):
            files, files_before = planned_files(host, target, settings.handlers), read_files(host)
            undo.callback(_quietly, lambda: write_files(host, files_before))
            write_files(host, files_before | files)  # what the engine names now is there until it names other ones
            if new != old:
                undo.callback(_quietly, lambda: _configure(host, engine, old))
                engine = _configure(host, engine, new)
        with _stage("proof"):
            proofs = [prove(host, engine, target, config) for config in sorted(set(configs.values()))]
            measured = {one.name: measure(host, target, config_of(one)) for one in settings.handlers if one.measure}
            write_files(host, files)
            _prune(host, target)
        undo.pop_all()
    return Report(
        action="install",
        ok=True,
        target=target,
        stage="done",
        message=f"VMs run by {accelerator} {why}"[:500],
        accelerator=accelerator,
        kernel=proofs[0].kernel,
        proof_s=proofs[0].seconds,
        engine=engine.title,
        handlers=tuple(configs),
        measured=measured,
    )


def uninstall(host: Host, *, socket_path: str = DEFAULT_SOCKET) -> Report:
    """Take everything away. Raises StageFailed; it can be repeated."""
    with _stage("sandboxes"):
        users = {target: found for target in payloads(host) if (found := users_of(target))}
        if users:
            pids = ", ".join(str(pid) for found in users.values() for pid in found[:10])
            raise NodeError(f"sandboxes run on this node still (processes {pids}): end their pods")
    with _stage("engine"):
        engine = find_engine(host, socket_path)
        old = host.read(engine.config)
        if configured_handler(old):
            _configure(host, engine, without_handler(old or ""))
    with _stage("payload"):
        for target in payloads(host):
            remove_payload(host, target)
        _remove_ours(host)
    return Report(action="uninstall", ok=True, stage="done")


@contextlib.contextmanager
def _stage(name: str) -> Iterator[None]:
    log.info("stage %s", name)
    try:
        yield
    except (NodeError, OSError) as exc:
        raise StageFailed(name, str(exc)) from exc


def _configure(host: Host, engine: Engine, text: str | None) -> Engine:
    """Write the engine's configuration, and have it read. The engine may have been started again since it was found."""
    host.write(engine.config, text)
    try:
        current = find_engine(host, engine.socket)
    except NodeError:  # it has not come back from an attempt of before
        current = engine
    return restart_engine(host, current)


def _note(host: Host) -> bool:
    """Whether this is the first installation."""
    if host.read(NOTES) is not None:
        return False
    there = [path for path in (*OURS, OPT) if host.path(path).exists()]
    kept = tuple(path for path in there if any(host.path(path).iterdir()))
    notes = Notes(kept, tuple(path for path in there if path not in kept))
    host.write(NOTES, msgspec.json.encode(notes).decode())
    return True


def _remove_ours(host: Host) -> None:
    text = host.read(NOTES)
    notes = msgspec.json.decode(text, type=Notes) if text else None
    for path in OURS:
        if notes is not None and path not in notes.kept:
            host.remove(path, itself=path not in notes.empty)
    host.remove(HOME)
    if notes is not None and OPT not in (*notes.kept, *notes.empty):
        with contextlib.suppress(OSError):  # somebody else has put something there meanwhile
            host.path(OPT).rmdir()


def _prune(host: Host, target: str) -> None:
    """Payloads of before, from which no sandbox runs any more."""
    for other in payloads(host):
        if other != target and not users_of(other):
            remove_payload(host, other)


def _quietly(undo: Callable[[], object]) -> None:
    """While a failure is on its way up: what else fails is said, and does not hide it."""
    try:
        undo()
    except (NodeError, OSError) as exc:
        log.error("cannot undo: %s", exc)
