"""`create`, `start` and `run`: a container's bundle, its VM's supervisor and its proxy brought together."""

from __future__ import annotations

import os
import time
from contextlib import suppress

from katapod.oci import wire
from katapod.oci.errors import NOT_RUNNING, OciError
from katapod.oci.foreground import wait_for_end
from katapod.oci.json_file import read_object
from katapod.oci.link import Link
from katapod.oci.proxy import Proxy, start_proxy
from katapod.oci.records import Record, State, Store, SupervisorDir
from katapod.oci.streams import process_streams
from katapod.oci.words import default_root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from katapod.oci.arguments import Call

__all__ = ["create", "introduce", "refuse_descriptors", "run", "start", "tell_pid"]

CONFIG_MAX = 16 << 20  # bytes
STATE = "/run"
_NOTIFY = "NOTIFY_SOCKET="


def create(call: Call) -> int:
    """Everything but the start of the program."""
    _make(call, foreground=False)
    return 0


def start(call: Call) -> int:
    _start(Store(call.root).record(call.id))
    return 0


def run(call: Call) -> int:
    """create, start, and without --detach wait for the end and delete."""
    detach = "detach" in call.switches
    proxy = _make(call, foreground=not detach)
    record = Store(call.root).record(call.id)
    try:
        _start(record)
    except BaseException:
        _delete(record)
        raise
    if detach:
        return 0
    status = wait_for_end(proxy.pid, terminal=proxy.foreground_terminal)
    if "keep" not in call.switches:
        _delete(record)
    return status


def _start(record: Record) -> None:
    state = record.read()
    if state["status"] == "stopped":
        raise OciError("cannot start a container that has stopped")
    if state["status"] != "created":
        raise OciError(f"cannot start an already running container: {record.id} is {state['status']}")
    with _link_to(record, state) as link:
        link.call({"do": "start", "id": record.id})


def _link_to(record: Record, state: State) -> Link:
    try:
        return Link.to(record.supervisor(state))
    except wire.Gone as exc:
        raise OciError(NOT_RUNNING) from exc


def _delete(record: Record) -> None:
    from katapod.oci.deletion import delete_container

    delete_container(record, force=True)


def _make(call: Call, *, foreground: bool) -> Proxy:
    _refuse_rootless(call)
    refuse_descriptors(call)
    bundle = os.path.abspath(call.values.get("bundle") or os.getcwd())
    spec = _read_spec(bundle)
    _refuse_notifications(spec)
    store = Store(call.root)
    record = store.record(call.id)
    namespaces = {one.get("type"): one.get("path", "") for one in _dict(spec, "linux").get("namespaces") or ()}
    holder = _holder_of(store, str(namespaces.get("network") or ""))
    sandbox_id = holder or store.new_sandbox(record.id, default_root())
    state = _first_state(record, bundle, spec, sandbox_id)
    record.claim(state)
    process = _dict(spec, "process")
    proxy = None
    try:
        fds, terminal = process_streams(call, process, foreground=foreground)
        request: dict[str, Any] = {
            "do": "create",
            "id": record.id,
            "bundle": bundle,
            "terminal": bool(process.get("terminal")),
        }
        try:
            place = SupervisorDir(store.root, sandbox_id)
            link = Link.to(place) if holder else _start_supervisor(call, store.root, sandbox_id)
            with link:
                try:
                    proxy = introduce(link, request, fds, terminal, (record.id,))
                except BaseException:
                    if not holder:
                        link.wait_end()
                    raise
        except wire.Gone as exc:
            said = _last_words(place)
            if not holder:  # it was killed: nobody but us knows what it has left
                with suppress(OciError):
                    _delete(record)
            raise OciError(f"cannot create {record.id}: {exc}{said}") from exc
        tell_pid(call, proxy.pid)
    except BaseException:
        if proxy is not None:
            _delete(record)
        record.remove()
        raise
    proxy.foreground_terminal = request["terminal"] and terminal is None
    return proxy


def refuse_descriptors(call: Call) -> None:
    if call.values.get("preserve-fds", "0") not in ("", "0"):
        raise OciError(
            f"cannot pass {call.values['preserve-fds']} descriptors (--preserve-fds) to {call.id}: it runs in a VM, "
            "which has none of this kernel's files"
        )


def _refuse_rootless(call: Call) -> None:
    """Who is root in a user namespace may be so of the machine that it has (a system container), or of nothing but
    files of its own (rootless Podman): the former owns what we keep our records in. Not in words by which Podman would
    take it for the program's own lack of rights."""
    if os.geteuid() != 0 or os.stat(STATE).st_uid != 0:
        raise OciError(
            f"cannot create {call.id}: a virtual machine needs root on the host, for {STATE}, taps, cgroups and the "
            "users of its jail; rootless engines can run this container with runc or crun "
            "(docs/adr/0062-rootless-engines.md)"
        )


def _refuse_notifications(spec: dict[str, Any]) -> None:
    """By Podman's --sdnotify=container a program is to say on a socket of the host that it is ready. It could not, and
    who waits for it would wait in vain."""
    names = [
        str(one)[len(_NOTIFY) :] for one in _dict(spec, "process").get("env") or () if str(one).startswith(_NOTIFY)
    ]
    places = {str(one.get("destination")) for one in spec.get("mounts") or () if isinstance(one, dict)}
    if any(name in places or os.path.dirname(name) in places for name in names):
        raise OciError(
            f"cannot pass the socket {names[0]} (NOTIFY_SOCKET): processes of a virtual machine cannot reach a "
            "socket of the host; with Podman use --sdnotify=conmon"
        )


def introduce(
    link: Link, request: dict[str, Any], fds: list[int], terminal: int | None, names: tuple[str, ...]
) -> Proxy:
    """Have a process made: the supervisor says where its proxy is to be, and hears which that is. Closes `fds`. Raises
    OciError, Gone; no proxy is left then."""
    try:
        answer = link.call(request, fds)
        proxy = start_proxy(names, answer, terminal)
    finally:
        for fd in fds:
            os.close(fd)
    try:
        link.call({"pid": proxy.pid}, [proxy.end])
    except BaseException:
        os.close(proxy.end)  # which ends it
        os.waitpid(proxy.pid, 0)
        raise
    os.close(proxy.end)
    return proxy


def _start_supervisor(call: Call, root: str, sandbox_id: str) -> Link:
    from katapod.oci.holder import start_supervisor

    return start_supervisor(call, root, sandbox_id)


def _read_spec(bundle: str) -> dict[str, Any]:
    """As far as commands need it; the supervisor checks it all. Raises OciError."""
    path = os.path.join(bundle, "config.json")
    try:
        return read_object(path, CONFIG_MAX)
    except OSError as exc:
        raise OciError(f"JSON specification file {path} not found: {os.strerror(exc.errno or 0)}") from exc


def _dict(value: dict[str, Any], key: str) -> dict[str, Any]:
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def _holder_of(store: Store, netns: str) -> str | None:
    """The VM that has this network namespace already: that of a pod, or of --network container:X."""
    if not netns:
        return None
    try:
        status, own = os.stat(netns), os.stat("/proc/self/ns/net")
    except OSError as exc:
        raise OciError(f"cannot open the network namespace {netns}: {os.strerror(exc.errno or 0)}") from exc
    if os.path.samestat(status, own):
        raise OciError("cannot use the host's network: a virtual machine has a network stack of its own")
    found = store.sharing(f"{status.st_dev}:{status.st_ino}")
    return str(found["sandbox"]) if found is not None else None


def _first_state(record: Record, bundle: str, spec: dict[str, Any], sandbox_id: str) -> State:
    now = time.time_ns()
    created = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9))
    annotations = _dict(spec, "annotations")
    return {
        "id": record.id,
        "bundle": bundle,
        "rootfs": os.path.join(bundle, str(_dict(spec, "root").get("path", ""))),
        "created": f"{created}.{now % 10**9:09d}Z",
        "owner": "root",
        "annotations": {key: value for key, value in annotations.items() if isinstance(value, str)},
        "status": "creating",
        "pid": 0,
        "sandbox": sandbox_id,
        "netns": "",
        "cgroups": [],
    }


def _last_words(place: SupervisorDir) -> str:
    try:
        with open(place.log, "rb") as handle:
            lines = handle.read()[-2000:].decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return f": {lines[-1]}" if lines else ""


def tell_pid(call: Call, pid: int) -> None:
    """Write it to --pid-file in one step, since who waits for it must not see half a number; send a descriptor of the
    process to --pidfd-socket. Raises OciError."""
    path, pidfd_socket = call.values.get("pid-file", ""), call.values.get("pidfd-socket", "")
    if pidfd_socket:
        from katapod.oci.console import send_descriptor

        fd = os.pidfd_open(pid)
        try:
            send_descriptor(pidfd_socket, b"pidfd", fd)
        finally:
            os.close(fd)
    if not path:
        return
    directory, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(directory, f".{name}")
    try:
        with open(temporary, "w") as handle:
            handle.write(str(pid))
        os.rename(temporary, path)
    except OSError as exc:
        raise OciError(f"cannot write {path}: {os.strerror(exc.errno or 0)}") from exc
