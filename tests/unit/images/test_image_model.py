"""Image references, names and configs: what is accepted, and what is refused with which words."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapod.model.image import (
    CONFIG_MAX_BYTES,
    ImageParseError,
    Platform,
    SkopeoReference,
    StoredName,
    Transport,
    find_name,
    parse_digest,
    parse_image_config,
    parse_image_name,
    parse_image_ref,
    parse_platform,
    suggest_name,
)

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("busybox", "busybox:latest"),
        ("debian:12", "debian:12"),
        ("app/web:1.0", "app/web:1.0"),
        ("docker:24", "docker:24"),
        ("docker.io/library/debian:12-slim", "docker.io/library/debian:12-slim"),
        ("127.0.0.1:5000/a__b/c.d-e:V_1", "127.0.0.1:5000/a__b/c.d-e:V_1"),
        ("[::1]:5000/app", "[::1]:5000/app:latest"),
        (f"app@{DIGEST}", f"app@{DIGEST}"),
        ("oci-thing", "oci-thing:latest"),
    ],
)
def test_stored_names(text: str, stored: str) -> None:
    assert parse_image_ref(text) == StoredName(stored)


@pytest.mark.parametrize(
    ("text", "transport", "location", "selector"),
    [
        ("oci:/a/b", Transport.OCI, "/a/b", ""),
        ("oci:rel/dir:v1", Transport.OCI, "rel/dir", "v1"),
        ("oci-archive:x y.tar:t", Transport.OCI_ARCHIVE, "x y.tar", "t"),
        ("docker-archive:d.tar:debian:12", Transport.DOCKER_ARCHIVE, "d.tar", "debian:12"),
        ("docker-archive:d.tar:@1", Transport.DOCKER_ARCHIVE, "d.tar", "@1"),
        ("dir:/plain", Transport.DIR, "/plain", ""),
        ("docker://debian", Transport.DOCKER, "docker.io/library/debian", ":latest"),
        ("docker://team/app:1", Transport.DOCKER, "docker.io/team/app", ":1"),
        ("docker://localhost/app", Transport.DOCKER, "localhost/app", ":latest"),
        ("docker://h:5000/a/b:1", Transport.DOCKER, "h:5000/a/b", ":1"),
        (f"docker://q.example/a:1@{DIGEST}", Transport.DOCKER, "q.example/a", f"@{DIGEST}"),
    ],
)
def test_skopeo_references(text: str, transport: Transport, location: str, selector: str) -> None:
    reference = parse_image_ref(text)
    assert reference == SkopeoReference(transport, location, selector)
    assert parse_image_ref(str(reference)) == reference


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "0 characters"),
        ("../../etc", "not NAME"),
        ("a/../b", "not NAME"),
        ("/etc/passwd", "not NAME"),
        ("./image", "not NAME"),
        ("a//b", "not NAME"),
        ("name:", "not NAME"),
        ("a:b:c", "not NAME"),
        ("-rf", "not NAME"),
        ("name with space", "not NAME"),
        ("name\n", "control characters"),
        ("oci:/a\0b", "control characters"),
        ("app@sha256:12", "not NAME"),
        ("x" * 300, "300 characters"),
        ("x" * 250, "too long with its tag"),
        ("y" * 5000, "5000 characters"),
        ("app:" + "t" * 129, "not NAME"),
        ("https://example.org/x", "unknown transport https://"),
        ("oci:", "no path"),
        ("dir:/a:tag", "no tag"),
        ("docker-daemon:app:1", "docker-daemon: is not supported"),
        ("containers-storage:app", "containers-storage: is not supported"),
        ("docker://", "not docker://HOST"),
        ("docker://Host/UPPER", "not docker://HOST"),
        ("docker://h/" + "x" * 300, "not docker://HOST"),
    ],
)
def test_refused_references(text: str, cause: str) -> None:
    with pytest.raises(ImageParseError, match=cause) as caught:
        parse_image_ref(text)
    assert str(caught.value).startswith("cannot use ")


def test_upper_case_gets_a_hint() -> None:
    with pytest.raises(ImageParseError) as caught:
        parse_image_ref("BusyBox")
    assert caught.value.hint == "image names are in lower case"


@given(st.text(max_size=300))
def test_no_name_leads_out_of_a_directory(text: str) -> None:
    try:
        name = parse_image_name(text).text
    except ImageParseError:
        return
    assert len(name) <= 255
    assert not name.startswith(("/", ".", "-"))
    assert ".." not in name.partition("@")[0].rpartition(":")[0].split("/")
    assert name.isascii()
    assert name.isprintable()


def test_long_almost_names_are_refused_quickly() -> None:
    """An expression that tries all ways would not be done with one in years."""
    for text in ("a-" * 127, "a_" * 127, "a." * 127 + "!", "a/" * 127):
        with pytest.raises(ImageParseError):
            parse_image_ref(text)


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("oci:/x/App Dir:v1", "app-dir:v1"),
        ("oci-archive:/x/web.oci.tar.gz", "web:latest"),
        ("docker-archive:/x/d.tar:debian:12", "debian:12"),
        ("docker-archive:/x/d.tar:@0", "d:latest"),
        ("docker://debian:12", "docker.io/library/debian:12"),
        ("dir:/x/y/", "y:latest"),
    ],
)
def test_suggested_names(reference: str, name: str) -> None:
    parsed = parse_image_ref(reference)
    assert isinstance(parsed, SkopeoReference)
    assert suggest_name(parsed).text == name


def test_no_name_can_be_made() -> None:
    with pytest.raises(ImageParseError, match="cannot make a name") as caught:
        suggest_name(SkopeoReference(Transport.OCI, "/x/äöü"))
    assert "--name" in caught.value.hint


def test_find_name() -> None:
    names = ["docker.io/library/debian:12", "q.example/debian:12", "debian:11", "oci:/x/debian:12"]
    assert find_name(StoredName("debian:11"), names) == ("debian:11",)
    assert find_name(StoredName("library/debian:12"), names) == ("docker.io/library/debian:12",)
    assert find_name(StoredName("debian:12"), names) == ("docker.io/library/debian:12", "q.example/debian:12")
    assert find_name(StoredName("bian:12"), names) == ()


@pytest.mark.parametrize("text", ["", "sha256:", "sha256:../../x", "sha512:" + "0" * 64, "sha256:" + "A" * 64])
def test_digest_cannot_be_a_path(text: str) -> None:
    with pytest.raises(ImageParseError):
        parse_digest(text)
    assert parse_digest(DIGEST) == "0a" * 32


def test_platform() -> None:
    mine = parse_platform("x86_64")
    assert str(mine) == "amd64/linux"
    assert mine.runs(Platform("linux", "amd64", "v2"))
    assert mine.runs(Platform("", ""))
    assert not mine.runs(Platform("linux", "386"))
    assert not mine.runs(Platform("windows", "amd64"))
    assert str(Platform("linux", "arm", "v7")) == "arm/v7/linux"
    assert parse_platform("riscv64").architecture == "riscv64"


def _config(**changes: object) -> bytes:
    document = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [DIGEST]}}
    return json.dumps(document | changes).encode()


def test_full_config() -> None:
    asked = {
        "Entrypoint": ["/e"],
        "Cmd": ["c"],
        "Env": ["A=b"],
        "WorkingDir": "/w",
        "User": "u:g",
        "StopSignal": "SIGINT",
        "ExposedPorts": {"80/tcp": {}},
        "Volumes": {"/data": {}},
        "Labels": {"k": "v"},
        "Healthcheck": {"unknown": ["to", "OCI"]},
    }
    config = parse_image_config(_config(config=asked, variant="v2", created="2024-01-02T03:04:05.123456789Z"))
    assert config.platform == Platform("linux", "amd64", "v2")
    assert (config.entrypoint, config.cmd, config.env) == (("/e",), ("c",), ("A=b",))
    assert (config.working_dir, config.user, config.stop_signal) == ("/w", "u:g", "SIGINT")
    assert (config.exposed_ports, config.volumes, config.labels) == (("80/tcp",), ("/data",), {"k": "v"})
    assert config.diff_ids == (DIGEST,)
    assert config.created is not None
    assert config.created.year == 2024


@pytest.mark.parametrize("asked", [None, {}, {"Entrypoint": None, "Cmd": None, "Env": None, "Labels": None}])
def test_absent_parts_are_empty(asked: object) -> None:
    config = parse_image_config(_config(config=asked, created="yesterday"))
    assert (config.entrypoint, config.cmd, config.env, config.labels, config.created) == ((), (), (), {}, None)


def test_a_label_without_a_value_is_empty() -> None:
    assert parse_image_config(_config(config={"Labels": {"k": None}})).labels == {"k": ""}


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "not valid"),
        (b"{}", "rootfs"),
        (b"[" * 100_000, "not valid"),
        (b"\xff\xfe", "not valid"),
        (_config(config={"Env": "A=b"}), r"Expected `array \| null`, got `str` - at `\$.config.Env`"),
        (_config(config={"Cmd": ["a", 1]}), "config.Cmd"),
        (_config(config={"Cmd": ["a\0b"]}), "NUL character in Cmd"),
        (_config(rootfs={"type": "squashfs"}), "squashfs"),
        (b" " * (CONFIG_MAX_BYTES + 1), "are allowed"),
    ],
)
def test_refused_configs(data: bytes, cause: str) -> None:
    with pytest.raises(ImageParseError, match=cause):
        parse_image_config(data)
