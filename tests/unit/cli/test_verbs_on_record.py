"""Verbs of every day: their words, and what they print of what is on record. No VM is started."""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from katapod.cli.copying import Place, parse_place
from katapod.cli.execute import execute
from katapod.cli.main import load_command
from katapod.cli.not_here import NOT_HERE
from katapod.cli.program import VERBS, kata_runtime
from katapod.cli.settings import Globals
from katapod.cli.tables import Column, print_table
from katapod.host import bridge
from katapod.host.event_log import note_event
from katapod.host.state import StateStore
from katapod.model.attachment import AttachmentRecord, PublishedPort
from katapod.model.cni import parse_network
from katapod.model.config import Config
from katapod.model.errors import KatapodError, UsageError
from katapod.model.layout import Layout
from katapod.model.log_flags import parse_tail, parse_time
from katapod.model.record import ContainerRecord, SandboxRecord, State
from katapod.sandbox import recovery


class Here(Globals):
    root = Path()

    @property
    def layout(self) -> Layout:
        roots = {name: self.root / name for name in ("state_root", "data_root", "image_root", "volume_root")}
        return replace(Layout(), **roots, vm_root=self.root / "vm", share_root=self.root / "share")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(Here, "root", tmp_path)
    found = Here()
    config = parse_network(b'{"cniVersion": "1.0.0", "name": "bridge", "plugins": [{"type": "bridge"}]}', "x")
    attachment = AttachmentRecord(config, "/run/netns/none", (), "", ports=(PublishedPort(8080, 80),))
    locks = dict[str, int]()
    for name, state, code in (("web", State.RUNNING, None), ("old", State.STOPPED, 3)):
        container = ContainerRecord(name, "busybox", ("sleep", "9"), state, exit_code=code, finished_at=5.0)
        record = SandboxRecord(
            name,
            2.0 if code is None else 1.0,
            1,
            "boot",
            state=state,
            containers=(container,),
            attachment=attachment if code is None else None,
            labels={"app": name},
        )
        locks[name] = StateStore(found.layout).create(record)
    os.close(locks["old"])  # nobody holds it any more; of the other one we are the supervisor
    yield found
    os.close(locks["web"])


def call(here: Globals, *words: str) -> tuple[int, str]:
    command: Any = kata_runtime.get_command(click.Context(kata_runtime), words[0])
    done = CliRunner().invoke(command, words[1:], obj=here, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.return_value or 0, done.output


def test_list_by_template(here: Here) -> None:
    assert call(here, "ps", "-a", "--format", "{{.Names}} {{.State}} {{.Ports}}")[1].splitlines() == [
        "web running 0.0.0.0:8080->80/tcp",
        "old exited ",
    ]
    lines = call(here, "list", "--format", "json")[1].splitlines()
    assert [json.loads(line)["Names"] for line in lines] == ["web", "old"]
    table = call(here, "list", "--format", "table {{.Names}}\\t{{.State}}")[1].splitlines()
    assert [line.split() for line in table] == [["NAMES", "STATE"], ["web", "running"], ["old", "exited"]]


def test_list_of_some(here: Here) -> None:
    assert call(here, "list", "-q", "--filter", "status=exited") == (0, "old\n")
    assert call(here, "list", "-q", "-f", "label=app=web") == (0, "web\n")
    assert call(here, "list", "-aq", "-n", "1") == (0, "web\n")
    assert call(here, "list", "-ql") == (0, "web\n")
    assert len(json.loads(call(here, "list", "--json")[1])) == 2


def test_ports(here: Here) -> None:
    assert call(here, "port", "web") == (0, "80/tcp -> 0.0.0.0:8080\n")
    assert call(here, "port", "web", "80") == (0, "0.0.0.0:8080\n")
    assert call(here, "port", "web", "80/tcp") == (0, "0.0.0.0:8080\n")
    with pytest.raises(KatapodError, match="it is not published"):
        call(here, "port", "web", "81")
    assert call(here, "port", "old") == (0, "")


def test_inspect_by_template(here: Here) -> None:
    assert call(here, "inspect", "-f", "{{.Name}} {{.State.ExitCode}}", "web", "old")[1] == "/web 0\n/old 3\n"
    status, said = call(here, "inspect", "--format", "{{.Name}}", "none", "web")
    assert (status, "/web\n" in said, "cannot find none" in said) == (1, True, True)
    with pytest.raises(UsageError, match="several sandboxes as trees"):
        call(here, "inspect", "web", "old")
    with pytest.raises(UsageError, match="this inspects containers"):
        call(here, "inspect", "--type", "image", "web")


def test_what_has_ended_can_be_waited_for_and_stopped(here: Here) -> None:
    assert call(here, "wait", "old") == (0, "3\n")
    assert call(here, "stop", "old") == (0, "old\n")
    assert call(here, "stop", "--ignore", "none") == (0, "none\n")
    status, said = call(here, "wait", "none")
    assert (status, "none" in said) == (1, True)
    with pytest.raises(KatapodError, match="it has stopped"):
        call(here, "attach", "old")


def test_what_was_created(here: Here) -> None:
    container = ContainerRecord("made", "busybox", ("sleep", "9"), State.CREATED)
    record = SandboxRecord("made", 3.0, 0, "b", state=State.CREATED, lasting=True, containers=(container,))
    os.close(StateStore(here.layout).create(record))
    assert call(here, "ps", "-a", "--format", "{{.Names}} {{.State}} {{.Status}}")[1].splitlines()[0] == (
        "made created Created"
    )
    assert json.loads(call(here, "list", "--json")[1])[0]["status"] == "created"
    assert call(here, "inspect", "-f", "{{.State.Status}} {{.HostConfig.RestartPolicy.Name}}", "made")[1] == (
        "created no\n"
    )
    assert call(here, "wait", "made") == (0, "0\n")
    assert call(here, "stop", "made") == (0, "made\n")
    status, said = call(here, "start", "made")
    assert (status, "nothing was kept to start it again by" in said) == (1, True)
    assert call(here, "prune", "-f") == (0, "made\nold\n")


def test_what_its_policy_is_about_to_start(here: Here) -> None:
    store = StateStore(here.layout)
    old = replace(store.read("old"), restart="on-failure:3", restarts=2, restart_at=9.0)
    lock = store.reclaim(old)
    row = call(here, "ps", "-a", "--filter", "name=old", "--format", "{{.State}} {{.Status}}")[1]
    assert row.startswith("restarting Restarting (3) ")
    found = call(
        here,
        "inspect",
        "-f",
        "{{.RestartCount}} {{.State.Restarting}} {{.State.Running}} {{.HostConfig.RestartPolicy.MaximumRetryCount}}",
        "old",
    )
    assert found == (0, "2 true true 3\n")
    assert call(here, "start", "old") == (0, "old\n")  # as one that runs
    status, said = call(here, "delete", "old")
    assert (status, "it is running" in said) == (1, True)
    assert call(here, "prune", "-f") == (0, "")
    os.close(lock)


def test_which_are_started_with_the_host(here: Here) -> None:
    store = StateStore(here.layout)
    for name, policy, asked, code in (
        ("a1", "always", True, 0),
        ("u1", "unless-stopped", False, 0),
        ("u2", "unless-stopped", True, 0),
        ("f1", "on-failure:3", False, 1),
        ("f2", "on-failure", False, 0),
        ("n1", "no", False, 1),
    ):
        ended = ContainerRecord(name, "busybox", ("x",), State.STOPPED, exit_code=code)
        record = SandboxRecord(name, 3.0, 0, "b", state=State.STOPPED, restart=policy, stop_asked=asked)
        os.close(store.create(replace(record, containers=(ended,))))
    words = [word for kind in ("always", "unless-stopped", "on-failure") for word in ("-f", f"restart-policy={kind}")]
    status, said = call(here, "start", "--all", *words)
    assert status == 1
    tried = {name for name in ("a1", "u1", "u2", "f1", "f2", "n1") if f"cannot start container {name}" in said}
    assert tried == {"a1", "u1", "f1"}


def test_list_finds_what_a_start_of_the_host_has_left(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "boot_time", lambda: time.time() + 60)
    store = StateStore(here.layout)
    container = ContainerRecord("left", "busybox", ("x",), State.RUNNING, started_at=1.0)
    store.layout.sandbox("left").data.mkdir(parents=True)
    store.keep(SandboxRecord("left", 9.0, 1, "b", state=State.RUNNING, containers=(container,)))
    assert call(here, "list", "-q") == (0, "left\nweb\nold\n")
    assert json.loads(call(here, "list", "--json")[1])[0]["status"] == "stopped (137)"


def test_start_and_its_words(here: Here) -> None:
    assert call(here, "start", "web") == (0, "web\n")  # it runs
    status, said = call(here, "start", "none", "old", "web")
    assert (status, "cannot find none" in said, "nothing was kept" in said, "web\n" in said) == (
        1,
        True,
        True,
        True,
    )
    for words, told in (
        ((), "no container given"),
        (("--all", "web"), "--all with names"),
        (("--filter", "name=web"), "--filter without --all"),
        (("-a", "web", "old"), "several containers at once"),
    ):
        with pytest.raises(UsageError, match=told):
            call(here, "start", *words)
    assert call(here, "start", "--all", "--filter", "restart-policy=always") == (0, "")
    status, said = call(here, "restart", "none")
    assert (status, "cannot find none" in said) == (1, True)
    status, said = call(here, "restart", "web")
    assert (status, "nothing was kept" in said) == (1, True)
    assert StateStore(here.layout).read("web").state is State.RUNNING


def test_events(here: Here) -> None:
    web = StateStore(here.layout).read("web")
    note_event(here.layout, "start", web)
    note_event(here.layout, "die", web, exitCode=3)
    past = ("--since", "1h", "--until", "0s")
    lines = call(here, "events", *past)[1].splitlines()
    assert [re.sub(r"^[-0-9]+T[0-9:]+\.[0-9]{9}[+-][0-9]{2}:[0-9]{2} ", "", line) for line in lines] == [
        "container start web (app=web, image=busybox, name=web)",
        "container die web (app=web, exitCode=3, image=busybox, name=web)",
    ]
    some = call(here, "events", *past, "-f", "event=die", "-f", "label=app=web", "--format", "json")[1]
    found = json.loads(some)
    assert (found["Action"], found["Actor"]["Attributes"]["exitCode"]) == ("die", "3")
    assert call(here, "events", *past, "-f", "container=old") == (0, "")
    assert call(here, "events", *past, "--format", "{{.ID}} {{.Status}}", "-f", "event=start")[1] == "web start\n"
    for words in (("-f", "x=y"), ("-f", "event"), ("--since", "never")):
        with pytest.raises(UsageError, match=r"--filter|--since"):
            call(here, "events", *words)


def test_networks_of_ones_own(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "net.d"
    config = Config()
    config = replace(config, katapod=replace(config.katapod, cni_conf_dir=str(directory)))
    monkeypatch.setattr(Here, "load_config", lambda self, **more: config)

    async def routes() -> list[str]:
        return ["10.186.0.0/16"]

    monkeypatch.setattr(bridge, "networks_in_use", routes)
    monkeypatch.setattr(bridge, "bridge_subnet", lambda: "")
    assert call(here, "network", "create", "app", "--label", "a=b", "-o", "mtu=1400") == (0, "app\n")
    assert call(here, "network", "create", "--subnet", "10.20.0.0/24", "--internal", "db") == (0, "db\n")
    rows = {row["name"]: row["subnet"] for row in json.loads(call(here, "network", "ls", "--json")[1])}
    assert rows == {"bridge": "", "app": "10.187.0.0/16", "db": "10.20.0.0/24"}
    assert call(here, "network", "ls", "-q") == (0, "bridge\napp\ndb\nnone\n")
    assert (
        call(here, "network", "ls", "-f", "name=d", "--format", "{{.Name}} {{.Driver}}")[1]
        == "bridge bridge\ndb bridge\n"
    )
    assert call(here, "network", "inspect", "-f", "{{.Name}} {{.IPAM.Config}}", "db")[1].startswith("db ")
    with pytest.raises(KatapodError, match="cannot find network none-such"):
        call(here, "network", "inspect", "-f", "{{.Name}}", "none-such")
    with pytest.raises(UsageError, match="a key of name, driver"):
        call(here, "network", "ls", "-f", "colour=red")
    for words, told in (
        (("app",), "there is one of that name"),
        (("x1", "--subnet", "10.20.0.128/25"), "network db has addresses"),
        (("bridge",), "a meaning of its own"),
        (("-d", "macvlan", "x1"), "files of /etc/cni/net.d"),
        (("-o", "mtu=x", "x1"), "known is mtu=N"),
        (("../x",), "it is not a network name"),
    ):
        with pytest.raises(KatapodError, match=told):
            call(here, "network", "create", *words)
    (directory / "other.conflist").write_bytes(
        b'{"cniVersion": "1.0.0", "name": "other", "plugins": [{"type": "bridge"}]}'
    )
    status, said = call(here, "network", "rm", "other", "none-such", "db")
    assert (status, "has not made it" in said, "cannot find network none-such" in said) == (1, True, True)
    assert call(here, "network", "rm", "-f", "none-such") == (0, "")
    assert call(here, "network", "prune", "-f") == (0, "app\n")
    assert [path.name for path in directory.iterdir()] == ["other.conflist"]


def test_prune_removes_what_has_stopped(here: Here) -> None:
    with pytest.raises(UsageError, match="standard input is not a terminal"):
        call(here, "prune")
    assert call(here, "prune", "-f") == (0, "old\n")
    assert call(here, "list", "-q") == (0, "web\n")


def test_disk_usage(here: Here) -> None:
    lines = call(here, "system", "df", "--format", "{{.Type}} {{.TotalCount}}")[1].splitlines()
    assert lines == ["Images 0", "Containers 2", "Local Volumes 0"]


@pytest.mark.parametrize(
    ("words", "number"), [("-9 web", "9"), ("-KILL web", "KILL"), ("-s TERM web", "TERM"), ("web", "KILL")]
)
def test_signals_as_of_kill(words: str, number: str) -> None:
    command: Any = kata_runtime.get_command(click.Context(kata_runtime), "kill")
    context = command.make_context("kill", words.split(), obj=Globals())
    assert (context.params["number"], context.params["names"]) == (number, ("web",))


def test_exec_in_the_background_has_no_input(here: Here) -> None:
    with pytest.raises(UsageError, match="a process in the background has no standard input"):
        CliRunner().invoke(execute, ["-di", "web", "cat"], obj=here, standalone_mode=False, catch_exceptions=False)
    with pytest.raises(UsageError, match="a process in the foreground is not left"):
        CliRunner().invoke(
            execute, ["--detach-keys", "ctrl-q", "web", "cat"], obj=here, standalone_mode=False, catch_exceptions=False
        )


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("web:/etc", Place("web", "/etc")),
        ("web:etc", Place("web", "etc")),
        ("/a:b", Place("", "/a:b")),
        ("./a:b", Place("", "./a:b")),
        ("-", Place("", "-")),
        ("file", Place("", "file")),
    ],
)
def test_places(text: str, place: Place) -> None:
    assert parse_place(text) == place


@pytest.mark.parametrize(
    "words", [("cp", "a", "b"), ("cp", "web:/a", "old:/b"), ("cp", "web:", "b"), ("update", "web")]
)
def test_refused(here: Here, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        call(here, *words)


def test_times_of_logs() -> None:
    now = 1_000_000.0
    assert parse_time("2026-11-23T19:50:12Z", now) == b"2026-11-23T19:50:12.000000000Z"
    assert parse_time("2026-11-23T19:50:12+01:00", now) == b"2026-11-23T18:50:12.000000000Z"
    assert parse_time("1h1m1s", now) == parse_time(f"{now - 3661}", now)
    assert parse_time("10m", now) == b"1970-01-12T13:36:40.000000000Z"
    assert (parse_tail("all"), parse_tail("-1"), parse_tail("7")) == (None, None, 7)
    for text in ("yesterday", "", "m", "-5s"):
        with pytest.raises(UsageError, match="neither a time nor a duration"):
            parse_time(text, now)
    with pytest.raises(UsageError, match="neither a number"):
        parse_tail("many")


def test_a_table_fits(capsys: pytest.CaptureFixture[str]) -> None:
    columns = [Column("A", lambda row: row[0]), Column("B", lambda row: row[1], least=8)]
    print_table(columns, [("a" * 10, "b" * 40)], width=30)
    head, line = capsys.readouterr().out.splitlines()
    assert (head, line) == ("A           B", "aaaaaaaaaa  " + "b" * 15 + "...")
    print_table(columns, [("a" * 40, "b" * 40)], width=30)
    assert capsys.readouterr().out.splitlines()[1] == "a" * 40 + "  bbbbb..."


def test_verbs_that_are_not_here_are_none_that_are() -> None:
    load_command(*VERBS)
    assert not set(NOT_HERE) & set(VERBS)
    for why, way in NOT_HERE.values():
        assert why
        assert way
