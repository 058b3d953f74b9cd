"""Which execs a client hands over, and how the other side reads their words."""

import contextlib
import io
import os
import socket
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapod.cli.handed_over import read_exec
from katapod.model.errors import KatapodError
from katapod.model.flags import UserName
from katapod.model.layout import Layout
from katapod.supervisor import exec_client
from katapod.supervisor.exec_client import exec_by_supervisor, sandbox_named

FLAGS = [
    "-i",
    "--interactive",
    "--privileged",
    "-t",
    "-it",
    "--vm",
    "-e",
    "--env",
    "-e=1",
    "--env=A=1",
    "--user=1",
    "-h",
]
words = st.lists(
    st.sampled_from([*FLAGS, "--help", "--", "-w", "-u", "box", "true", "/tmp", "A=1", "", "-x"]), max_size=7
)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["box", "true"], "box"),
        (["-e", "A=1", "--env=B=2", "-w", "/tmp", "-u", "1", "--privileged", "box", "sh", "-c", "--help"], "box"),
        (["-e", "box", "other", "true"], "other"),
        (["box"], ""),  # a shell in the VM
        ([], ""),
        (["-e"], ""),
        (["-t", "box", "sh"], ""),
        (["--vm", "box", "sh"], ""),
        (["--help", "box", "sh"], ""),
        (["--", "box", "sh"], ""),
        (["../box", "sh"], ""),
        ([".", "sh"], ""),
        (["", "sh"], ""),
    ],
)
def test_what_is_handed_over(given: list[str], name: str) -> None:
    assert sandbox_named(given) == name


@given(words)
def test_a_name_is_what_the_command_line_means(given: list[str]) -> None:
    name = sandbox_named(given)
    if not name:
        return
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            command = read_exec(given)
    except (click.ClickException, KatapodError):
        return
    finally:
        assert not printed.getvalue()  # of another process, which this would be
    assert command is None or command.name == name


def test_the_words_are_read_as_the_caller_would() -> None:
    command = read_exec(["-i", "-e", "A=1", "-w", "/tmp", "-u", "7:8", "--privileged", "box", "sh", "-c", "-i"])
    assert command is not None
    assert (command.name, command.interactive) == ("box", True)
    request = command.request
    assert (request.args, request.env, request.cwd) == (("sh", "-c", "-i"), ("A=1",), "/tmp")
    assert (request.user, request.privileged, request.tty) == (UserName(user="7", group="8"), True, False)


@pytest.mark.parametrize("given", [["-t", "box", "sh"], ["--vm", "box", "sh"], ["box"], ["-e", "HOME", "box", "sh"]])
def test_what_needs_the_caller_itself_is_left_to_it(given: list[str]) -> None:
    assert read_exec(given) is None


def test_the_socket_is_the_layouts() -> None:
    expected = Layout().sandbox("box").exec_socket
    assert Path(exec_client.STATE_ROOT, "box", exec_client.SOCKET) == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="only root hands over")
@pytest.mark.parametrize(
    "options", [["--config", "no-such.toml"], ["--config=no-such.toml"], ["--kata-config", "a", "--config", "b"]]
)
def test_a_configuration_is_not_for_what_runs_already(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exec_client, "STATE_ROOT", str(tmp_path))
    asked = []

    def hand_over(server: socket.socket, path: str, data: bytes, *rest: object) -> bool:
        asked.append((path, data))
        return False

    monkeypatch.setattr(exec_client, "hand_over", hand_over)
    assert exec_by_supervisor([*options, "exec", "box", "true"]) is None
    assert exec_by_supervisor(["exec", "box", "true"]) is None
    assert len(asked) == 2
    assert asked[0] == asked[1]
    assert exec_by_supervisor([*options, "--debug", "exec", "box", "true"]) is None
    assert exec_by_supervisor([*options, "run", "box"]) is None
    assert exec_by_supervisor(["--config"]) is None
    assert len(asked) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root hands over")
def test_without_a_server_an_exec_is_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exec_client, "STATE_ROOT", str(tmp_path))
    assert exec_by_supervisor(["exec", "box", "true"]) is None
    (tmp_path / "box").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "box" / exec_client.SOCKET))
        assert exec_by_supervisor(["exec", "box", "true"]) is None
        listener.listen(1)
        monkeypatch.setattr(exec_client, "TAKE_LIMIT_S", 0.01)
        assert exec_by_supervisor(["exec", "box", "true"]) is None  # it does not answer
    for others in (["run", "box"], ["--debug", "exec", "box", "true"], ["exec", "box"], []):
        assert exec_by_supervisor(others) is None
