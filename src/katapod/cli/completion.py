"""Completion for bash, zsh and fish: click finds the words, our scripts offer files where there are none.

With _KATA_RUNTIME_COMPLETE=bash_source in the environment the program prints the script for bash; the script calls it
with bash_complete.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
)
from click.shell_completion import shell_complete as answer

from katapod.model.errors import KatapodError, UsageError
from katapod.oci.completing import complete_oci

__all__ = ["SCRIPTS", "complete", "install_completion", "show_completion"]

BASH = r"""
_kata_runtime_completion() {
    local IFS=$'\n'
    COMPREPLY=($(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD="$COMP_CWORD" _KATA_RUNTIME_COMPLETE=bash_complete "$1"))
}

complete -o default -F _kata_runtime_completion kata-runtime
"""

# The first line is for compinit. The file may be sourced, or be the function that the first Tab loads.
ZSH = r"""
#compdef kata-runtime

_kata_runtime_completion() {
    local -a found
    found=("${(@f)$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT - 1)) _KATA_RUNTIME_COMPLETE=zsh_complete \
        kata-runtime)}")
    if [[ -n $found[1] ]]; then
        _describe -V word found
    else
        _files
    fi
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _kata_runtime_completion "$@"
else
    compdef _kata_runtime_completion kata-runtime
fi
"""

FISH = r"""
function _kata_runtime_completion
    set -l found (env COMP_WORDS=(commandline -cp) COMP_CWORD=(commandline -t) _KATA_RUNTIME_COMPLETE=fish_complete \
        kata-runtime)
    if test -n "$found" # of nothing there is an empty line
        printf '%s\n' $found
    else
        __fish_complete_path (commandline -t)
    end
end

complete --command kata-runtime --no-files --arguments "(_kata_runtime_completion)"
"""

SCRIPTS = {"bash": BASH.strip(), "zsh": ZSH.strip(), "fish": FISH.strip()}

# below the home directory: the script, and what makes the shell find it: a line of a file, none for fish
PLACES = {
    "bash": (".bash_completions/kata-runtime.sh", ".bashrc", "source ~/.bash_completions/kata-runtime.sh"),
    "zsh": (".zfunc/_kata-runtime", ".zshrc", "fpath+=~/.zfunc; autoload -Uz compinit; compinit"),
    "fish": (".config/fish/completions/kata-runtime.fish", "", ""),
}


class _Words(ShellComplete):
    """Those of OCI engines, which click does not know, or click's."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        found = complete_oci(args, incomplete)
        if found is None:
            return super().get_completions(args, incomplete)
        return [CompletionItem(word, help=about or None) for word, about in found]


class _Bash(_Words, BashComplete):
    def source(self) -> str:
        return SCRIPTS["bash"]

    def format_completion(self, item: CompletionItem) -> str:
        return str(item.value)


class _Zsh(_Words, ZshComplete):
    def source(self) -> str:
        return SCRIPTS["zsh"]

    def format_completion(self, item: CompletionItem) -> str:
        """NAME:DESCRIPTION, as _describe takes it."""
        return f"{item.value}:{item.help}" if item.help else str(item.value)


class _Fish(_Words, FishComplete):
    def source(self) -> str:
        return SCRIPTS["fish"]

    def format_completion(self, item: CompletionItem) -> str:
        return f"{item.value}\t{item.help}" if item.help else str(item.value)


def complete(program: click.Command, instruction: str) -> int:
    """Print what `instruction` asks for: SHELL_source or SHELL_complete; returns the exit status."""
    for known in (_Bash, _Zsh, _Fish):
        add_completion_class(known)
    return answer(program, {}, "kata-runtime", "_KATA_RUNTIME_COMPLETE", instruction)


def show_completion() -> None:
    """Print the script for the shell that called us. Raises UsageError where that is none we know."""
    print(SCRIPTS[_shell()])


def install_completion() -> None:
    """Write it to the user's home directory, for shells started from now on. Raises UsageError, KatapodError."""
    shell = _shell()
    script, startup, line = PLACES[shell]
    home = Path.home()
    path = home / script
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{SCRIPTS[shell]}\n")
        if startup:
            _add_line(home / startup, line)
    except OSError as exc:
        raise KatapodError(f"cannot install completion: {exc.filename}: {exc.strerror}") from exc
    print(f"{shell} completion is in {path}; new shells use it")


def _add_line(path: Path, line: str) -> None:
    before = path.read_text() if path.exists() else ""
    if line not in before.splitlines():
        gap = "" if not before or before.endswith("\n") else "\n"
        with path.open("a") as handle:
            handle.write(f"{gap}{line}\n")


def _shell() -> str:
    """The shell that called us, perhaps through sudo, else the user's."""
    names = [*_ancestors(), os.path.basename(os.environ.get("SHELL", ""))]
    for name in names:
        if name in SCRIPTS:
            return name
    raise UsageError(
        f"cannot tell which shell to use: the caller is none of {', '.join(SCRIPTS)}",
        hint="for bash: _KATA_RUNTIME_COMPLETE=bash_source kata-runtime",
    )


def _ancestors() -> Iterator[str]:
    """The names of the processes above this one, from the nearest. Source: proc_pid_stat(5)."""
    pid = os.getppid()
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            return
        name, _, rest = stat.partition("(")[2].rpartition(")")
        yield name.removeprefix("-")  # of a login shell
        pid = int(rest.split()[1])
