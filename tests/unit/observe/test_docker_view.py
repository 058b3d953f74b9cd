"""Containers in docker's words."""

import json
from typing import Any

import pytest
from msgspec.structs import replace

from katapod.model import oci
from katapod.model.attachment import AttachmentRecord, PublishedPort
from katapod.model.cni import parse_network
from katapod.model.errors import UsageError
from katapod.model.go_template import parse_template
from katapod.model.record import ContainerRecord, SandboxRecord, State
from katapod.observe.docker_view import container_document, container_row, matches, parse_filter

NOW = 1_000_000.0
CONTAINER = ContainerRecord(
    "web", "busybox", ("sleep", "9"), State.RUNNING, started_at=NOW - 300, user="0", volumes=("db",), stop_signal=15
)
RECORD = SandboxRecord(
    "web", NOW - 400, 1, "boot", state=State.RUNNING, containers=(CONTAINER,), labels={"app": "a", "tier": "x"}
)
STOPPED = replace(
    RECORD,
    state=State.STOPPED,
    containers=(replace(CONTAINER, state=State.STOPPED, exit_code=3, finished_at=NOW - 60),),
)


def row(record: SandboxRecord = RECORD, *, lost: bool = False) -> dict[str, Any]:
    return container_row(record, lost=lost, now=NOW)


def test_a_running_container() -> None:
    found = row()
    assert (found["Names"], found["State"], found["Status"]) == ("web", "running", "Up 5 minutes")
    assert (found["Command"], found["Labels"], found["Networks"]) == ('"sleep 9"', "app=a,tier=x", "none")
    json.dumps(found)


def test_states() -> None:
    assert (row(STOPPED)["State"], row(STOPPED)["Status"]) == ("exited", "Exited (3) 60 seconds ago")
    assert row(lost=True)["State"] == "dead"
    paused = replace(RECORD, containers=(replace(CONTAINER, state=State.PAUSED),))
    assert (row(paused)["State"], row(paused)["Status"]) == ("paused", "Up 5 minutes (Paused)")
    assert row(replace(RECORD, state=State.CREATING, containers=()))["State"] == "created"


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["name=we"], True),
        (["name=^/web$"], True),
        (["name=^we$"], False),
        (["status=exited"], False),
        (["status=exited", "status=running"], True),
        (["label=app"], True),
        (["label=app=a", "label=tier"], True),
        (["label=app=a", "label=none"], False),
        (["ancestor=busybox"], True),
        (["volume=db", "status=running"], True),
        (["volume=other"], False),
        (["exited=3"], False),
        (["network=none"], True),
        (["id=we"], True),
    ],
)
def test_filters(texts: list[str], found: bool) -> None:
    filters: dict[str, list[str]] = {}
    for text in texts:
        key, value = parse_filter(text)
        filters.setdefault(key, []).append(value)
    assert matches(row(), RECORD, filters) is found


@pytest.mark.parametrize("text", ["name", "colour=red", "status=idle"])
def test_bad_filters(text: str) -> None:
    with pytest.raises(UsageError, match="--filter"):
        parse_filter(text)


def test_what_inspect_says() -> None:
    config = parse_network(b'{"cniVersion": "1.0.0", "name": "bridge", "plugins": [{"type": "bridge"}]}', "x")
    attachment = AttachmentRecord(
        config, "/run/netns/x", (), "0:0", ports=(PublishedPort(8080, 80),), addresses=("10.0.0.2",), gateway="10.0.0.1"
    )
    spec = oci.Spec(
        oci_version="1.0.2",
        process=oci.Process(args=("sleep", "9"), cwd="/srv", env=("A=1",)),
        root=oci.Root(path="/r", readonly=True),
        hostname="web-1",
        mounts=(
            oci.Mount(destination="/db", type="bind", source="/v/db/_data", options=("rbind", "rw")),
            oci.Mount(destination="/src", type="bind", source="/home", options=("rbind", "ro")),
        ),
    )
    document = container_document(replace(RECORD, attachment=attachment), spec, lost=False, log_path="/log")

    def shown(text: str) -> str:
        return parse_template(text).render(document)

    assert shown("{{.State.Status}} {{.State.Running}} {{.Config.Hostname}}") == "running true web-1"
    assert shown("{{.NetworkSettings.IPAddress}}") == "10.0.0.2"
    assert shown("{{range .NetworkSettings.Networks}}{{.Gateway}}{{end}}") == "10.0.0.1"
    assert shown('{{(index (index .NetworkSettings.Ports "80/tcp") 0).HostPort}}') == "8080"
    assert shown("{{range .Mounts}}{{.Type}}:{{.Destination}}:{{.RW}} {{end}}") == ("volume:/db:true bind:/src:false ")
    assert shown("{{range .Config.Env}}{{.}}{{end}} {{json .Config.Labels}}") == 'A=1 {"app":"a","tier":"x"}'
    json.dumps(document)


def test_what_inspect_says_of_one_that_has_ended() -> None:
    document = container_document(STOPPED, None, lost=False, log_path="/log")
    state = document["State"]
    assert (state["Status"], state["ExitCode"], state["Running"], state["Pid"]) == ("exited", 3, False, 0)
    assert state["FinishedAt"].startswith("1970-01-12T13:45:40.")
    assert document["Mounts"] == []
