"""containerd reads its configuration with our handlers in it, and serves the CRI by it."""

import subprocess
from pathlib import Path

import pytest

from katapod.operator.node.containerd_config import with_handlers
from kit.containerd import DEBIAN_CONFIG
from kit.kata import wait_for

TOP = Path(__file__).resolve().parents[2]
SHIM = "/opt/katapod/1/bin/containerd-shim-kata-v2"


def plugins(tmp_path: Path, config: str) -> dict[str, str]:
    """What has become of each plugin of a containerd with this configuration: ok, skip or error."""
    path, address = tmp_path / "config.toml", tmp_path / "sock"
    path.write_text(config.replace("/var/lib/containerd", str(tmp_path / "opt")))
    command = ["containerd", "--config", str(path), "--address", str(address), "--root", str(tmp_path / "root")]
    with (tmp_path / "log").open("wb") as log:
        running = subprocess.Popen([*command, "--state", str(tmp_path / "state")], stdout=log, stderr=log)
    try:
        wait_for(address.exists, "containerd listens")
        listed = subprocess.run(
            ["ctr", "--address", address, "plugins", "ls"], check=True, capture_output=True, text=True, timeout=180
        )
    finally:
        running.terminate()
        running.wait(180)
    return {words[1]: words[-1] for words in map(str.split, listed.stdout.splitlines())}


@pytest.mark.parametrize("before", [None, "version = 2\n", DEBIAN_CONFIG], ids=["no-file", "empty", "debian"])
def test_with_handlers_added(before: str | None, tmp_path: Path) -> None:
    assert plugins(tmp_path, with_handlers(before, {"kata": ""}, SHIM))["cri"] == "ok"


def test_with_our_snippet_and_its_table_of_the_built_in_handler(tmp_path: Path) -> None:
    """Below a configuration that names no handler, as docs/how-to/containerd.md has it."""
    snippet = (TOP / "packaging/containerd/kata.toml").read_text().replace("version = 2\n", "")
    config = DEBIAN_CONFIG + snippet
    for line in ("[plugins", "runtime_type"):
        config = config.replace(f"\n#{line}", f"\n{line}")
    assert config.count("runtimes.runc]") == 1
    assert plugins(tmp_path, config)["cri"] == "ok"
