"""The node's engine, found by its socket."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapod.operator.node.engine import find_engine
from katapod.operator.node.errors import NodeError
from katapod.operator.node.host import Host

HOST = Host(Path("/"))


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
        one.listen()
        yield path


def test_a_node_without_one(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=r"no containerd answers at .*: No such file or directory; only containerd"):
        find_engine(HOST, str(tmp_path / "none"))


def test_something_else_at_its_socket(listening: Path) -> None:
    """Found by SO_PEERCRED: it is this process, a Python."""
    with pytest.raises(NodeError, match=r"is not containerd's: .*python.* says 'Python 3"):
        find_engine(HOST, str(listening))
