"""`tools/install` as `make install` calls it: what a packager gets below DESTDIR."""

import os
import subprocess
from pathlib import Path

import pytest

from katapod import __version__
from katapod.model.config import Config, parse_config

ROOT = Path(__file__).parents[2]
FOREIGN = "# somebody else's\n"


def install(destdir: Path) -> str:
    argv = [str(ROOT / "tools/install"), str(destdir), "/usr"]
    return subprocess.run(argv, cwd=ROOT, check=True, stderr=subprocess.PIPE, text=True, timeout=240).stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    destdir = tmp_path_factory.mktemp("destdir")
    install(destdir)
    return destdir / "usr"


def call(installed: Path, *arguments: str, **variables: str) -> str:
    """Run the installed program from where it lies now: its own file names the final place."""
    script = (installed / "bin/kata-runtime").read_text()
    assert 'sys.path.insert(0, "/usr/lib/katapod")' in script
    moved = installed / "kata-runtime"
    moved.write_text(script.replace("/usr/lib/katapod", str(installed / "lib/katapod")))
    moved.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **variables}
    argv = [str(moved), *arguments]
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, env=environment, timeout=60).stdout


def test_program_runs_with_its_own_library(installed: Path) -> None:
    assert call(installed, "--version").startswith("kata-runtime  : ")
    assert "Run containers" in call(installed, "--help")


def test_other_programs_are_there(installed: Path) -> None:
    for name in ("containerd-shim-kata-v2", "kata-monitor"):
        assert os.access(installed / "bin" / name, os.X_OK)


def test_script_for_bug_reports_knows_its_version(installed: Path) -> None:
    argv = [str(installed / "bin/kata-collect-data.sh"), "--version"]
    said = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout
    assert said == f"kata-collect-data.sh version {__version__}\n"


def test_default_configuration_is_installed_and_changes_nothing(installed: Path) -> None:
    path = installed / "share/kata-containers/defaults/configuration.toml"
    parsed = parse_config(path.read_bytes(), str(path))
    assert (parsed.problems, parsed.config) == ((), Config())


def test_configuration_of_others_stays(tmp_path: Path) -> None:
    path = tmp_path / "usr/share/kata-containers/defaults/configuration.toml"
    path.parent.mkdir(parents=True)
    path.with_name("configuration-qemu.toml").write_text(FOREIGN)
    path.symlink_to("configuration-qemu.toml")
    assert "is not ours and stays" in install(tmp_path)
    assert path.is_symlink()
    assert path.read_text() == FOREIGN


def test_bash_completes(installed: Path) -> None:
    script = installed / "share/bash-completion/completions/kata-runtime"
    program = f"""
        source {script}
        complete -p kata-runtime > /dev/null
        COMP_WORDS=(kata-runtime im) COMP_CWORD=1
        _kata_runtime_completion {installed}/kata-runtime
        echo "${{COMPREPLY[@]}}"
    """
    call(installed, "--version")  # makes the program that runs here
    found = subprocess.run(["bash", "-ec", program], check=True, stdout=subprocess.PIPE, text=True, timeout=60)
    assert found.stdout.split() == ["image"]


def test_zsh_and_fish_find_their_completion(installed: Path) -> None:
    zsh = (installed / "share/zsh/site-functions/_kata-runtime").read_text()
    assert zsh.splitlines()[0] == "#compdef kata-runtime"  # compinit reads the first line only
    fish = (installed / "share/fish/vendor_completions.d/kata-runtime.fish").read_text()
    assert "complete --command kata-runtime" in fish


def test_documentation_is_installed(installed: Path) -> None:
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "docs/architecture.svg", "docs/how-to/run-containers.md"):
        assert (installed / "share/doc/katapod" / name).stat().st_size > 0, name
