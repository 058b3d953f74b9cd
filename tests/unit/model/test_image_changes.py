"""--change of `commit`: instructions of a Dockerfile."""

from typing import Any

import pytest

from katapod.model.errors import UsageError
from katapod.model.image_changes import apply_change


def changed(*texts: str, **before: Any) -> dict[str, Any]:
    config = dict(before)
    for text in texts:
        apply_change(config, text)
    return config


def test_commands() -> None:
    assert changed('CMD ["a", "b c"]', "entrypoint x y") == {
        "Cmd": ["a", "b c"],
        "Entrypoint": ["/bin/sh", "-c", "x y"],
    }


def test_words() -> None:
    assert changed("USER 1:2", "WORKDIR /srv", "STOPSIGNAL QUIT") == {
        "User": "1:2",
        "WorkingDir": "/srv",
        "StopSignal": "QUIT",
    }


def test_pairs_are_added() -> None:
    found = changed('ENV A=1 B="two words"', "ENV OLD form of it", "LABEL x=y", Env=["A=0", "C=3"], Labels={"k": "v"})
    assert found["Env"] == ["C=3", "A=1", "B=two words", "OLD=form of it"]
    assert found["Labels"] == {"k": "v", "x": "y"}


def test_places() -> None:
    found = changed("EXPOSE 80 53/udp", "VOLUME /a /b", 'VOLUME ["/c"]', ExposedPorts={"22/tcp": {}})
    assert found == {
        "ExposedPorts": {"22/tcp": {}, "80/tcp": {}, "53/udp": {}},
        "Volumes": {"/a": {}, "/b": {}, "/c": {}},
    }


@pytest.mark.parametrize(
    "text", ["", "CMD", "RUN ls", "CMD [", "CMD [1]", "ENV A=1 B", "ENV =x", "LABEL 'x", "VOLUME [1]", "nothing at all"]
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="cannot use --change"):
        changed(text)
