"""containerd's configuration with our handler in it, and as it was before."""

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapod.operator.node.containerd_config import configured_handler, with_handlers, without_handler
from katapod.operator.node.errors import NodeError
from kit.containerd import DEBIAN_CONFIG

SHIM = "/opt/katapod/1/bin/containerd-shim-kata-v2"


@pytest.mark.parametrize(
    "before", [None, "version = 2\n", "version = 2", "version = 3", DEBIAN_CONFIG, DEBIAN_CONFIG.strip()]
)
def test_it_is_added_and_removed_without_a_trace(before: str | None) -> None:
    after = with_handlers(before, {"kata": ""}, SHIM)
    parsed = tomllib.loads(after)
    plugin = "io.containerd.cri.v1.runtime" if parsed["version"] == 3 else "io.containerd.grpc.v1.cri"
    handler = parsed["plugins"][plugin]["containerd"]["runtimes"]["kata"]
    # containerd 1.6 starts a pod's sandbox by its runtime's type, whatever the path
    assert handler["runtime_path" if parsed["version"] == 3 else "runtime_type"] == SHIM
    assert configured_handler(after)
    assert without_handler(after) == before


def runtimes(text: str) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads(text)["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"]
    return found


@pytest.mark.parametrize("before", [None, "version = 2\n", DEBIAN_CONFIG])
def test_the_built_in_handler_stays(before: str | None) -> None:
    """containerd forgets it when it reads a first handler."""
    assert runtimes(with_handlers(before, {"kata": ""}, SHIM))["runc"] == {"runtime_type": "io.containerd.runc.v2"}


@pytest.mark.parametrize("name", ["runc", "crun"])
def test_handlers_that_are_there_are_all_there_are(name: str) -> None:
    table = (
        f'[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{name}]\nruntime_type = "io.containerd.runc.v2"\n'
    )
    assert set(runtimes(with_handlers(DEBIAN_CONFIG + table, {"kata": ""}, SHIM))) == {name, "kata"}


def test_the_built_in_handler_is_not_ours() -> None:
    with pytest.raises(NodeError, match="handler runc is configured already"):
        with_handlers(DEBIAN_CONFIG, {"runc": ""}, SHIM)


def test_another_payload_replaces_the_block() -> None:
    first = with_handlers(DEBIAN_CONFIG, {"kata": ""}, SHIM)
    second = with_handlers(first, {"kata": ""}, "/opt/katapod/2/shim")
    assert second == first.replace(SHIM, "/opt/katapod/2/shim")
    assert with_handlers(second, {"kata": ""}, "/opt/katapod/2/shim") == second


@given(st.text(st.characters(exclude_categories=["C"]), max_size=30))
def test_what_is_written_below_stays(comment: str) -> None:
    below = f"# {comment}\n"
    assert without_handler(with_handlers(DEBIAN_CONFIG, {"kata": ""}, SHIM) + below) == DEBIAN_CONFIG + below


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "version is 1"),
        ("version = [", "not TOML"),
        ("version = 9", "version is 9"),
        ('version = 2\nplugins = {"x" = {}}\n', "inline"),
        (
            DEBIAN_CONFIG + '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata]\nruntime_type = "x"\n',
            "already",
        ),
    ],
)
def test_a_file_that_cannot_have_it_is_refused(text: str, why: str) -> None:
    with pytest.raises(NodeError, match=why):
        with_handlers(text, {"kata": ""}, SHIM)


def test_half_a_block_is_refused() -> None:
    with pytest.raises(NodeError, match="by hand"):
        without_handler(with_handlers(DEBIAN_CONFIG, {"kata": ""}, SHIM).removesuffix("# END katapod\n"))


def test_handlers_with_configurations_of_their_own() -> None:
    config = "/opt/katapod/handlers/kata-big/configuration.toml"
    after = with_handlers(DEBIAN_CONFIG, {"kata": "", "kata-big": config}, SHIM)
    found = runtimes(after)
    assert "options" not in found["kata"]
    assert found["kata-big"]["options"] == {"ConfigPath": config}
    assert found["kata-big"]["runtime_type"] == SHIM
    assert with_handlers(after, {"kata": ""}, SHIM) == with_handlers(DEBIAN_CONFIG, {"kata": ""}, SHIM)
    assert without_handler(after) == DEBIAN_CONFIG


def test_any_handler_of_somebody_else_is_refused() -> None:
    taken = with_handlers(DEBIAN_CONFIG, {"kata-big": ""}, SHIM).replace("# BEGIN", "#").replace("# END", "#")
    with pytest.raises(NodeError, match="handler kata-big is configured already"):
        with_handlers(taken, {"kata": "", "kata-big": ""}, SHIM)
