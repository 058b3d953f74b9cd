"""What is collected leaves the machine as it is."""

from pathlib import Path

import pytest

from katapod.observe import collect


@pytest.mark.parametrize("used", [True, False])
async def test_podman_is_asked_only_where_it_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: bool
) -> None:
    """Its first call makes files of its own."""
    podman, locks = tmp_path / "podman", tmp_path / "libpod_lock"
    podman.write_text("#!/bin/sh\necho what podman says\n")
    podman.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(collect, "PODMAN_LOCKS", locks)
    if used:
        locks.touch()
    said = dict(await collect._managers())
    assert ("what podman says" in said["podman info"]) is used
    assert "what podman says" in said["podman --version"]
    assert said["docker info"] == "not installed"
