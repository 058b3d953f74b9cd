"""The shim's command line and what `start` decides before it starts anything."""

import hashlib
import json
from pathlib import Path

import pytest

from katapod.shim.arguments import Arguments, UsageError, parse_arguments
from katapod.shim.pb import runtime_pb2
from katapod.shim.start import StartError, _is_bootstrap, _socket_dir, pod_of, read_annotations, socket_path

USUAL = ["-namespace", "k8s.io", "-address", "/run/containerd/containerd.sock", "-id", "abc", "-bundle", "/b"]


def test_as_containerd_calls_it() -> None:
    found = parse_arguments([*USUAL, "-publish-binary", "/usr/bin/containerd", "-debug", "start"])
    assert (found.namespace, found.id, found.address, found.bundle, found.debug, found.action) == (
        *("k8s.io", "abc", "/run/containerd/containerd.sock", "/b"),
        True,
        "start",
    )


def test_as_crio_calls_it() -> None:
    words = ["-namespace=default", "-address", "", "-publish-binary", "/usr/bin/crio", "--id", "abc", "start"]
    found = parse_arguments(words)
    assert (found.namespace, found.address, found.id, found.bundle) == ("default", "", "abc", str(Path.cwd()))


@pytest.mark.parametrize("words", [["-v"], ["--version"], ["-info"], ["-h"]])
def test_alone(words: list[str]) -> None:
    found = parse_arguments(words)
    assert found.version or found.info or found.help


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["start"], "missing flag -id"),
        (["-id", "abc", "start"], "missing flag -namespace"),
        ([*USUAL, "stop"], "unknown action 'stop'"),
        ([*USUAL, "start", "delete"], "more than one action"),
        ([*USUAL, "-no-such-flag", "start"], "unknown flag -no-such-flag"),
        (["-id"], "-id needs a value"),
        ([*USUAL, "-debug=7", "start"], "-debug takes no value"),
    ],
)
def test_wrong_words(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_arguments(words)


@pytest.mark.parametrize(
    ("annotations", "pod"),
    [
        ({}, None),
        ({"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "p"}, None),
        ({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p"}, "p"),
        ({"io.kubernetes.cri-o.ContainerType": "sandbox", "io.kubernetes.cri-o.SandboxID": "p"}, None),
        ({"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "p"}, "p"),
        ({"io.kubernetes.docker.type": "podsandbox", "io.kubernetes.sandbox.id": "p"}, None),
        ({"io.kubernetes.docker.type": "container", "io.kubernetes.sandbox.id": "p"}, "p"),
    ],
)
def test_which_pod(annotations: dict[str, str], pod: str | None) -> None:
    assert pod_of(annotations, "config.json") == pod


@pytest.mark.parametrize(
    "annotations",
    [
        {"io.kubernetes.cri.container-type": "pod"},
        {"io.kubernetes.cri.container-type": "container"},
        {"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": ""},
    ],
)
def test_a_pod_that_makes_no_sense(annotations: dict[str, str]) -> None:
    with pytest.raises(StartError, match="cannot start: "):
        pod_of(annotations, "config.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "it is not JSON"),
        (b'{"annotations": {"a": 1}}', "must be an object whose values are strings"),
        (b'{"annotations": []}', None),
    ],
)
def test_a_config_that_cannot_be_read(tmp_path: Path, content: bytes, said: str | None) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    if said is None:
        assert read_annotations(str(path)) == {}
    else:
        with pytest.raises(StartError, match=said):
            read_annotations(str(path))
    with pytest.raises(StartError, match="No such file"):
        read_annotations(str(tmp_path / "none.json"))


def test_annotations_without_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"process": 7, "annotations": {"a": "b"}}))
    assert read_annotations(str(path)) == {"a": "b"}
    path.write_text("{}")
    assert read_annotations(str(path)) == {}


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("/run/containerd/containerd.sock", "/run/containerd/containerd.sock/k8s.io/abc"),
        ("/run/containerd/containerd.sock/", "/run/containerd/containerd.sock/k8s.io/abc"),
        ("//run//containerd/./x/../containerd.sock", "/run/containerd/containerd.sock/k8s.io/abc"),
        ("/", "/k8s.io/abc"),
        ("", "k8s.io/abc"),
    ],
)
def test_where_the_server_listens(address: str, text: str) -> None:
    """containerd joins the parts as paths are joined, and takes the hash of that."""
    found = socket_path("/run/containerd/s", address, "k8s.io", "abc")
    assert found == f"/run/containerd/s/{hashlib.sha256(text.encode()).hexdigest()}"
    assert len(found) < 107


def test_what_is_on_standard_input() -> None:
    """Options of older versions and parameters of newer ones parse as each other; only the latter name the instance."""
    arguments: Arguments = parse_arguments([*USUAL, "start"])
    params = runtime_pb2.BootstrapParams(instance_id="abc", namespace="k8s.io", socket_dir="/run/other/s")
    data = params.SerializeToString()
    assert _is_bootstrap(data, arguments)
    assert _socket_dir(data) == "/run/other/s"
    assert _socket_dir(runtime_pb2.BootstrapParams(instance_id="abc").SerializeToString()) == ""
    options = runtime_pb2.Options(type_url="runtimeoptions.v1.Options", config_path="/etc/x.toml").SerializeToString()
    for other in (b"", options, runtime_pb2.BootstrapParams(instance_id="x", namespace="k8s.io").SerializeToString()):
        assert not _is_bootstrap(other, arguments)
