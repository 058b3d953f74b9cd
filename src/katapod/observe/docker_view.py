"""Containers in the words of docker: what --format and --filter of `list` and `inspect` name. Pure."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from katapod.model import oci
from katapod.model.flags import has_label, refuse
from katapod.model.record import ContainerRecord, SandboxRecord, State

__all__ = ["container_document", "container_row", "matches", "parse_filter", "state_of", "status_of"]

NEVER = "0001-01-01T00:00:00Z"
"""Go's zero time, by which Docker says that something has not happened."""

FILTERS = ("id", "name", "label", "status", "ancestor", "exited", "network", "volume")
STATES = ("created", "running", "paused", "exited", "dead", "removing", "restarting")


def parse_filter(text: str, flag: str = "--filter") -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or key not in FILTERS:
        refuse(flag, text, f"it is not KEY=VALUE with a key of {', '.join(FILTERS)}", "status=running")
    if key == "status" and value not in STATES:
        refuse(flag, text, f"it is none of {', '.join(STATES)}", "status=running")
    return key, value


def matches(row: Mapping[str, Any], record: SandboxRecord, filters: Mapping[str, list[str]]) -> bool:
    """All keys, and of each any value; of labels all."""
    container = record.containers[0] if record.containers else None
    volumes = container.volumes if container else ()
    tests: dict[str, Callable[[str], bool]] = {
        "id": lambda value: row["ID"].startswith(value),
        "name": lambda value: (
            value.removeprefix("/").strip("^$") in row["Names"]
            if not value.startswith("^")
            else row["Names"] == value.strip("^/$")
        ),
        "status": lambda value: row["State"] == value,
        "ancestor": lambda value: value in (row["Image"], row["Image"].partition(":")[0]),
        "exited": lambda value: container is not None and str(container.exit_code) == value,
        "network": lambda value: value == row["Networks"],
        "volume": lambda value: value in volumes,
    }
    for key, values in filters.items():
        if key == "label":
            if not all(has_label(record.labels, value) for value in values):
                return False
        elif not any(tests[key](value) for value in values):
            return False
    return True


def state_of(record: SandboxRecord, *, lost: bool) -> str:
    """Docker's name of it."""
    container = record.containers[0] if record.containers else None
    state = container.state if container else record.state
    if lost:
        return "dead"
    if record.restart_at:
        return "restarting"
    return {State.STOPPED: "exited", State.CREATING: "created"}.get(state, state.value)


def status_of(record: SandboxRecord, *, lost: bool, now: float) -> str:
    """Such as "Up 4 minutes", "Exited (0) 2 hours ago"."""
    container = record.containers[0] if record.containers else None
    state = state_of(record, lost=lost)
    if container is None or state in ("dead", "created"):
        return state.capitalize()
    if state in ("exited", "restarting"):
        ended_at = container.finished_at or record.created_at
        return f"{state.capitalize()} ({container.exit_code}) {_ago(now - ended_at)} ago"
    return f"Up {_ago(now - container.started_at)}{' (Paused)' if state == 'paused' else ''}"


def _ago(seconds: float) -> str:
    for unit, size in (("weeks", 604800), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} seconds"


def container_row(record: SandboxRecord, *, lost: bool, now: float) -> dict[str, Any]:
    """Docker's columns of `ps`; all are text."""
    container = record.containers[0] if record.containers else None
    attachment = record.attachment
    return {
        "ID": record.sandbox_id,
        "Names": record.sandbox_id,
        "Name": record.sandbox_id,
        "Image": container.image if container else "",
        "Command": f'"{" ".join(container.command) if container else ""}"',
        "CreatedAt": time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(record.created_at)),
        "RunningFor": f"{_ago(now - record.created_at)} ago",
        "State": state_of(record, lost=lost),
        "Status": status_of(record, lost=lost, now=now),
        "Ports": ", ".join(map(str, attachment.ports)) if attachment else "",
        "Networks": attachment.network if attachment else "none",
        "Labels": ",".join(f"{name}={value}" for name, value in record.labels.items()),
        "LocalVolumes": str(len(container.volumes) if container else 0),
        "Mounts": ",".join(container.volumes if container else ()),
        "Size": "",
    }


def container_document(record: SandboxRecord, spec: oci.Spec | None, *, lost: bool, log_path: str) -> dict[str, Any]:
    """What `docker inspect` prints of a container. A container that has ended has no `spec` any more: what only that
    says is empty then."""
    container = record.containers[0] if record.containers else ContainerRecord(record.sandbox_id, "", ())
    command = list(container.command)
    return {
        "Id": record.sandbox_id,
        "Name": f"/{record.sandbox_id}",
        "Created": _stamp(record.created_at),
        "Path": command[0] if command else "",
        "Args": command[1:],
        "State": _state(record, container, lost=lost),
        "Image": container.image_digest,
        "ImageName": container.image,
        "LogPath": log_path,
        "RestartCount": record.restarts,
        "Driver": "katapod",
        "Platform": "linux",
        "Config": _config(record, container, spec),
        "HostConfig": _host_config(record, spec),
        "Mounts": _mounts(container, spec),
        "NetworkSettings": _network(record),
        "Sandbox": {
            "Accelerator": record.accelerator,
            "VCPUs": record.vcpus,
            "MemoryMiB": record.mem_mib,
            "Kernel": record.kernel,
            "SupervisorPid": record.supervisor_pid,
        },
    }


def _stamp(seconds: float) -> str:
    if not seconds:
        return NEVER
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1e9):09d}Z"


def _state(record: SandboxRecord, container: ContainerRecord, *, lost: bool) -> dict[str, Any]:
    state = state_of(record, lost=lost)
    return {
        "Status": state,
        "Running": state in ("running", "paused", "restarting"),
        "Paused": state == "paused",
        "Restarting": state == "restarting",
        "OOMKilled": container.oom_killed,
        "Dead": lost,
        "Pid": record.vmm_pid if state in ("running", "paused") else 0,
        "ExitCode": container.exit_code or 0,
        "Error": container.error or record.error,
        "StartedAt": _stamp(container.started_at),
        "FinishedAt": _stamp(container.finished_at),
    }


def _config(record: SandboxRecord, container: ContainerRecord, spec: oci.Spec | None) -> dict[str, Any]:
    return {
        "Hostname": spec.hostname if spec else "",
        "Domainname": spec.domainname if spec else "",
        "User": container.user,
        "Tty": container.terminal,
        "Env": list(spec.process.env) if spec else [],
        "Cmd": list(container.command),
        "Image": container.image,
        "WorkingDir": spec.process.cwd if spec else "",
        "Labels": record.labels,
        "StopSignal": str(container.stop_signal),
        "StopTimeout": container.stop_timeout_s,
        "Annotations": spec.annotations if spec else {},
    }


def _host_config(record: SandboxRecord, spec: oci.Spec | None) -> dict[str, Any]:
    resources = (spec.linux.resources if spec else None) or oci.Resources()
    cpus = spec.cpu_limit if spec else None
    policy, _, tries = record.restart.partition(":")
    return {
        "AutoRemove": record.auto_remove,
        "Memory": (spec.memory_limit if spec else None) or 0,
        "NanoCpus": round((cpus or 0) * 1e9),
        "PidsLimit": resources.pids.limit if resources.pids else None,
        "NetworkMode": record.attachment.network if record.attachment else "none",
        "ReadonlyRootfs": spec.root.readonly if spec else False,
        "RestartPolicy": {"Name": policy, "MaximumRetryCount": int(tries or 0)},
        "Runtime": "kata",
    }


MADE_FILES = ("/etc/hostname", "/etc/hosts", "/etc/resolv.conf")
"""Mounted, and made for the container by Docker, which does not list them, nor what --tmpfs asks for."""


def _mounts(container: ContainerRecord, spec: oci.Spec | None) -> list[dict[str, Any]]:
    found = []
    for mount in spec.mounts if spec else ():
        if oci.is_of_host(mount) and mount.destination not in MADE_FILES:
            name = next((name for name in container.volumes if f"/{name}/_data" in mount.source), "")
            found.append(
                {
                    "Type": "volume" if name else "bind",
                    "Name": name,
                    "Source": mount.source,
                    "Destination": mount.destination,
                    "RW": "ro" not in mount.options,
                }
            )
    return found


def _network(record: SandboxRecord) -> dict[str, Any]:
    attachment = record.attachment
    if attachment is None:
        return {"IPAddress": "", "Gateway": "", "MacAddress": "", "Ports": {}, "Networks": {}}
    ports: dict[str, list[dict[str, str]]] = {}
    for port in attachment.ports:
        entry = {"HostIp": port.host_ip or "0.0.0.0", "HostPort": str(port.host_port)}  # noqa: S104 - shown only
        ports.setdefault(f"{port.container_port}/{port.protocol}", []).append(entry)
    own = {
        "IPAddress": attachment.addresses[0] if attachment.addresses else "",
        "Gateway": attachment.gateway,
        "MacAddress": attachment.mac,
    }
    return {**own, "Ports": ports, "Networks": {attachment.network: own}}
