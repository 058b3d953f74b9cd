"""What the Tab key gets from `kata-runtime`, and the scripts that ask for it. No root is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from katapod.cli.completion import SCRIPTS

MAIN = "from katapod.cli.main import main; main()"


LIST = ["--json", "--quiet", "--all", "--latest", "--last", "--no-trunc", "--filter", "--size", "--format", "--help"]


def ask(instruction: str, line: str = "kata-runtime ") -> tuple[int, list[str]]:
    words = line.split(" ")
    environment = {
        **os.environ,
        "_KATA_RUNTIME_COMPLETE": instruction,
        "COMP_WORDS": line,
        "COMP_CWORD": words[-1] if instruction.startswith("fish") else str(len(words) - 1),
    }
    command = [sys.executable, "-W", "error", "-c", MAIN]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("kata-runtime im", ["image", "images"]),
        ("kata-runtime kata", []),  # kata-check and kata-env are hidden
        ("kata-runtime --k", ["--kata-config", "--kata-show-default-config-paths"]),
        ("kata-runtime --config x li", ["list"]),
        ("kata-runtime image guest ", ["ls", "show", "prune"]),
        ("kata-runtime list --", LIST),
        ("kata-runtime ps --", LIST),
        ("kata-runtime run --name=x --ne", ["--net", "--network"]),
        ("kata-runtime check --on", []),
        ("kata-runtime --config /et", []),  # files: the shell's own
        ("kata-runtime st", ["start", "stop", "stats", "state"]),
        ("kata-runtime --root /no st", ["start", "state"]),
        ("kata-runtime --root /et", []),
        ("kata-runtime --root /no --log", ["--log", "--log-format", "--log-level"]),
        ("kata-runtime create --bundle /b --p", ["--pid-file", "--pidfd-socket", "--preserve-fds"]),
        ("kata-runtime create --pu", ["--publish", "--publish-all", "--pull"]),
        ("kata-runtime create --bundle /et", []),
        ("kata-runtime --root /no kill -", ["--all", "--help"]),
        ("kata-runtime --root /no restore ", []),
    ],
)
def test_words(line: str, found: list[str]) -> None:
    status, words = ask("bash_complete", line)
    assert (status, [word for word in words if word]) == (0, found)


def test_other_shells_show_what_a_word_does() -> None:
    assert ask("zsh_complete", "kata-runtime vol") == (0, ["volume:Manage volumes."])
    assert ask("fish_complete", "kata-runtime vol") == (0, ["volume\tManage volumes."])


def test_containers_of_an_oci_engine(tmp_path: Path) -> None:
    (tmp_path / "box1").mkdir()
    (tmp_path / "box1/state.json").write_text("{}")
    (tmp_path / ".box1").mkdir()  # its supervisor's
    assert ask("bash_complete", f"kata-runtime --root {tmp_path} kill b") == (0, ["box1"])
    assert ask("bash_complete", f"kata-runtime --root={tmp_path} exec --cwd / b") == (0, ["box1"])
    assert ask("fish_complete", f"kata-runtime --root {tmp_path} kill box1 b") == (0, [""])
    assert ask("zsh_complete", f"kata-runtime --root {tmp_path} stat") == (0, ["state:Print the state of a container."])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str) -> None:
    assert ask(f"{shell}_source") == (0, SCRIPTS[shell].splitlines())
    assert f"_KATA_RUNTIME_COMPLETE={shell}_complete" in SCRIPTS[shell]


def test_another_shell_has_none() -> None:
    assert ask("tcsh_source") == (1, [])


def test_installed_once_in_the_home_directory(tmp_path: Path) -> None:
    startup = tmp_path / ".bashrc"
    startup.write_text("# mine")
    # not the last command, in whose place bash would put the program itself
    script = f"for _ in 1 2; do '{sys.executable}' -c '{MAIN}' --install-completion; done; exit 0"
    environment = {**os.environ, "HOME": str(tmp_path), "BASH_ENV": ""}
    subprocess.run(["bash", "-c", script], env=environment, check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert startup.read_text() == "# mine\nsource ~/.bash_completions/kata-runtime.sh\n"
    assert (tmp_path / ".bash_completions/kata-runtime.sh").read_text() == f"{SCRIPTS['bash']}\n"
    check = "source ~/.bashrc; complete -p kata-runtime"
    done = subprocess.run(["bash", "-c", check], env=environment, check=True, timeout=60, capture_output=True)
    assert b"_kata_runtime_completion kata-runtime" in done.stdout


def test_show_is_of_the_shell_that_asks() -> None:
    script = f"'{sys.executable}' -c '{MAIN}' --show-completion; exit $?"
    done = subprocess.run(["bash", "-c", script], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout == f"{SCRIPTS['bash']}\n"
