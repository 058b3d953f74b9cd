"""`make install`: what a user gets below PREFIX, and a packager below DESTDIR."""

import gzip
import os
import subprocess
from pathlib import Path

import pytest

from katapod import __version__
from katapod.model.config import Config, parse_config

ROOT = Path(__file__).parents[2]
FOREIGN = "# somebody else's\n"


def install(*settings: str) -> str:
    """Without the installation of packages, which is another target's work."""
    argv = ["make", "--silent", "--old-file=build/.packages", "install", *settings]
    environment = {key: value for key, value in os.environ.items() if key not in ("DESTDIR", "PREFIX")}
    before = os.umask(0o077)  # an administrator's, whose installation is for all all the same
    try:
        done = subprocess.run(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=240, env=environment)
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    destdir = tmp_path_factory.mktemp("destdir")
    install(f"DESTDIR={destdir}", "PREFIX=/usr")
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
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, env=environment, timeout=180).stdout


def test_program_runs_with_its_own_library(installed: Path) -> None:
    assert call(installed, "--version").startswith("kata-runtime  : ")
    assert "Run containers" in call(installed, "--help")


def test_other_programs_are_there(installed: Path) -> None:
    for name in ("containerd-shim-kata-v2", "kata-monitor"):
        assert os.access(installed / "bin" / name, os.X_OK)


def test_script_for_bug_reports_knows_its_version(installed: Path) -> None:
    argv = [str(installed / "bin/kata-collect-data.sh"), "--version"]
    said = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, timeout=180).stdout
    assert said == f"kata-collect-data.sh version {__version__}\n"


def test_default_configuration_is_installed_and_changes_nothing(installed: Path) -> None:
    path = installed / "share/kata-containers/defaults/configuration.toml"
    parsed = parse_config(path.read_bytes(), str(path))
    assert (parsed.problems, parsed.config) == ((), Config())


def test_all_may_read_and_nobody_else_may_write(installed: Path) -> None:
    wrong = []
    for path in [installed, *installed.rglob("*")]:
        mode = path.stat().st_mode
        if mode & 0o022 or not mode & 0o004 or (path.is_dir() and not mode & 0o001):
            wrong.append(f"{mode:o} {path}")
    assert wrong == []


def test_every_program_and_command_has_a_man_page(installed: Path) -> None:
    pages = {path.name for path in (installed / "share/man/man8").iterdir()}
    assert {"kata-runtime.8.gz", "kata-monitor.8.gz", "containerd-shim-kata-v2.8.gz"} <= pages
    listed = call(installed, "--help").partition("Commands")[2]
    for command in ("run", "exec", "check", "image-build", "image-guest-ls", "factory-status"):
        assert command.partition("-")[0] in listed
        with gzip.open(installed / f"share/man/man8/kata-runtime-{command}.8.gz", "rt") as page:
            assert ".TH" in page.readline() + page.readline()


def test_a_prefix_alone_is_enough_and_the_configuration_of_others_stays(tmp_path: Path) -> None:
    """As `make install PREFIX=/usr`."""
    prefix = tmp_path / "a prefix"
    path = prefix / "share/kata-containers/defaults/configuration.toml"
    path.parent.mkdir(parents=True)
    path.with_name("configuration-qemu.toml").write_text(FOREIGN)
    path.symlink_to("configuration-qemu.toml")
    assert "is not ours and stays" in install(f"PREFIX={prefix}")
    assert path.is_symlink()
    assert path.read_text() == FOREIGN

    program = prefix / "bin/kata-runtime"
    said = subprocess.run([program, "--version"], check=True, stdout=subprocess.PIPE, text=True, timeout=180).stdout
    assert said.startswith(f"kata-runtime  : {__version__}\n")
    for unit, started in (
        ("kata-monitor", "bin/kata-monitor"),
        ("kata-osbuilder-generate", "libexec/kata-containers/osbuilder/kata-osbuilder.sh"),
    ):
        text = (prefix / f"lib/systemd/system/{unit}.service").read_text()
        assert f"ExecStart={prefix}/{started}" in text
        assert os.access(prefix / started, os.X_OK)


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
    found = subprocess.run(["bash", "-ec", program], check=True, stdout=subprocess.PIPE, text=True, timeout=180)
    assert found.stdout.split() == ["image", "images"]


def test_zsh_and_fish_find_their_completion(installed: Path) -> None:
    zsh = (installed / "share/zsh/site-functions/_kata-runtime").read_text()
    assert zsh.splitlines()[0] == "#compdef kata-runtime"  # compinit reads the first line only
    fish = (installed / "share/fish/vendor_completions.d/kata-runtime.fish").read_text()
    assert "complete --command kata-runtime" in fish


def test_documentation_is_installed(installed: Path) -> None:
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "docs/architecture.svg", "docs/how-to/run-containers.md"):
        assert (installed / "share/doc/katapod" / name).stat().st_size > 0, name
