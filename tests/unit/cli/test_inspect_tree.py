"""The tree for people: nothing that a guest says steers the terminal, and it fits the width."""

import io

from rich.console import Console

from katapod.cli.inspect_tree import build_tree
from katapod.model import inspection as facts

HOSTILE = "\x1b]0;owned\x07[red]x[/red]\r\n\u202e\x9b31m"


def shown(sandbox: facts.SandboxFacts, width: int, *, everything: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    console.print(build_tree(sandbox, everything=everything))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def sandbox() -> facts.SandboxFacts:
    return facts.SandboxFacts(
        sandbox_id="s1",
        state="running",
        taken_at=10.0,
        containers=(facts.ContainerFacts(container_id="c1", name=HOSTILE, command=(HOSTILE,)),),
        command_line=(facts.OptionPart("-x", "?", known=False),),
        guest=facts.GuestFacts(
            kernel=HOSTILE,
            processes=tuple(facts.GuestProcess(pid=n, command=HOSTILE, container="c1") for n in range(60)),
            modules=tuple(facts.KernelModule(f"m{n}") for n in range(60)),
        ),
        missing=(facts.Missing("network", HOSTILE),),
    )


def test_control_characters_are_shown() -> None:
    text = shown(sandbox(), 120)
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "\\u001b]0;owned\\u0007[red]x[/red]\\r\\n\\u202e\\u009b31m" in shown(sandbox(), 400)


def test_width() -> None:
    assert max(map(len, shown(sandbox(), 60).splitlines())) <= 60


def test_long_lists_are_cut_unless_all_is_wanted() -> None:
    assert "and 20 more (--all)" in shown(sandbox(), 120)
    text = shown(sandbox(), 120, everything=True)
    assert "more (--all)" not in text
    assert "m59" in text
