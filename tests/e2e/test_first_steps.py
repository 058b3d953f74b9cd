"""docs/how-to/first-steps.md, typed as it stands there, by somebody in the directory of the sources."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from kit.debian import debian_archive
from kit.kata import KATA, RUN_PREFIX

SOURCES = Path(__file__).parents[2]
PAGE = SOURCES / "docs/how-to/first-steps.md"
NETNS = f"{RUN_PREFIX}steps"
LIMIT_S = 1800.0  # only against hanging
MARK = "@@@"
LISTED = ("NAME", "web")  # first words of what `list` says; other tests have containers, too


class Step(NamedTuple):
    command: str
    printed: list[str]


def steps() -> list[Step]:
    """The commands of all blocks, in order, with what is said to be printed."""
    found: list[Step] = []
    for block in re.findall(r"^```console\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("# "):
                found.append(Step(line[2:], []))
            else:
                found[-1].printed.append(line)
    return found


def pattern(printed: list[str]) -> str:
    """Of an output like it: other numbers, other columns, and anything for `...`."""
    text = ""
    for line in printed:
        if line == "...":
            text += r"(?:.*\n)*?"
            continue
        pieces = re.split(r"(\.\.\.|\d+(?:[.]\d+)*|[ \t]+)", line)
        shapes = {"...": ".*"}
        for piece in pieces:
            number = re.fullmatch(r"\d+(?:[.]\d+)*", piece)
            text += shapes.get(piece) or (r"\d+(?:[.]\d+)*" if number else r"[ \t]+" if piece.isspace() else "")
            if piece not in shapes and not number and not piece.isspace():
                text += re.escape(piece)
        text += r"[ \t]*\n"
    return text


@pytest.mark.parametrize(
    ("printed", "is_like"),
    [
        ("CPU 0.0 %\n1 of 2\n", True),
        ("CPU   97 %\n3 of 40\n", True),
        ("CPU much %\n1 of 2\n", False),
        ("CPU 0.0 %\n", False),
        ("CPU 0.0 %\n1 of 2\nmore\n", False),
    ],
)
def test_how_outputs_are_compared(printed: str, is_like: bool) -> None:
    assert bool(re.fullmatch(pattern(["CPU 0.0 %", "1 of 2"]), printed)) is is_like


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Words before a command, for a network namespace that plays the host. `mmdebstrap` there takes the archive that
    other tests have as well, which is made by the same command."""
    monkeypatch.setenv("KATAPOD_NETWORK", "bridge")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    programs = tmp_path / "bin"
    programs.mkdir()
    made = programs / "mmdebstrap"
    made.write_text(f'#!/bin/sh\nfor file; do :; done\nexec ln -s {debian_archive()} "$file"\n')
    made.chmod(0o755)
    (programs / "busybox").symlink_to(shutil.which("busybox") or "/bin/busybox")
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    subprocess.run(["ip", "netns", "add", NETNS], check=True)
    try:
        subprocess.run(["ip", "-n", NETNS, "link", "set", "lo", "up"], check=True)
        yield ["nsenter", f"--net=/run/netns/{NETNS}", "--"]
        removed = subprocess.run([KATA, "delete", "--force", "web"], capture_output=True, text=True, check=False)
        assert (removed.returncode, removed.stderr) == (0, ""), removed
    finally:
        subprocess.run(["ip", "netns", "delete", NETNS], check=True)


def test_each_block_prints_what_the_page_says(host: list[str], accelerator: str) -> None:
    wanted = steps()
    assert len(wanted) > 20
    script = "".join(f"echo {MARK}\n{step.command}\n" for step in wanted)
    done = subprocess.run(
        [*host, "bash"],
        input=script,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        cwd=SOURCES,
        check=False,
    )
    outputs = done.stdout.split(f"{MARK}\n")[1:]
    assert len(outputs) == len(wanted), done.stdout
    for step, said in zip(wanted, outputs, strict=True):
        output = said
        if step.command.startswith("kata-runtime list"):
            output = "".join(line for line in said.splitlines(keepends=True) if line.split()[0] in LISTED)
        printed = step.printed
        if accelerator != "uml":  # the page has the figures of a machine without KVM
            printed = [re.sub(r"uml \(User-mode Linux\)|^6\.1\.\d+$", "...", line) for line in printed]
        assert re.fullmatch(pattern(printed), output), f"$ {step.command}\n{output}\nis not like\n{printed}"
    assert done.returncode == 0, done.stdout
