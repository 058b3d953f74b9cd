"""Where an image may come from that is named without a transport."""

import pytest

from katapod.model.image import is_registry, parse_image_name, remote_names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("debian", ["docker://docker.io/library/debian:latest", "docker://registry.example/team/debian:latest"]),
        ("team/app:1", ["docker://docker.io/team/app:1", "docker://registry.example/team/team/app:1"]),
        ("quay.example/app:1", ["docker://quay.example/app:1"]),
        ("localhost/app", ["docker://localhost/app:latest"]),
        ("127.0.0.1:5000/app:2", ["docker://127.0.0.1:5000/app:2"]),
    ],
)
def test_remote_names(name: str, expected: list[str]) -> None:
    found = remote_names(parse_image_name(name), ("docker.io", "registry.example/team"))
    assert [str(each) for each in found] == expected


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        *[
            (each, True)
            for each in ("docker.io", "localhost", "127.0.0.1:5000", "registry.example/team/x", "host:5000")
        ],
        *[(each, False) for each in ("", "library", "https://registry.example", "registry.example/", "Host.example/T")],
    ],
)
def test_registries(text: str, is_one: bool) -> None:
    assert is_registry(text) is is_one
