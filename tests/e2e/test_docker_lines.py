"""The lines of docker-lines.txt by docker with runc, and by kata-runtime in docker's place: one shape, one status."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from kit.docker import docker_here
from kit.docker_lines import LINES, Line, read_lines
from kit.kata import RUN_PREFIX, Kata
from kit.pod_network import in_netns, open_netns
from kit.templates import kata_command

PREFIX = f"{RUN_PREFIX}l-"
HOST = f"{PREFIX}host"
LIMIT_S = 240.0
LEAST_ALIKE = 110
ALL = list(read_lines(LINES.read_text()))


class Told(NamedTuple):
    line: Line
    status: int
    out: str
    err: str

    @property
    def alike(self) -> bool:
        return self.status == self.line.status and self.line.fits(self.out)

    def __str__(self) -> str:
        wanted = "\n".join(self.line.shape)
        return (
            f"$ {self.line.words}\n{self.out}{self.err}[{self.status}]\nin place of\n{wanted}\n[{self.line.status}]\n"
        )


def run_all(directory: Path, docker: Sequence[str]) -> list[Told]:
    """Run the lines, in a directory with the files that they speak of; `docker` is what that word stands for."""
    programs, work = directory / "bin", directory / "work"
    programs.mkdir()
    work.mkdir()
    (programs / "docker").write_text(f'#!/bin/sh\nexec {shlex.join(docker)} "$@"\n')
    (programs / "docker").chmod(0o755)
    (work / "file").write_text("of the host\n")
    (work / "env").write_text("OF_FILE=of a file\n")
    environ = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OF_CALLER": "set"}
    environ.pop("KATAPOD_NETWORK", None)
    found = []
    for line in ALL:
        done = subprocess.run(
            ["sh", "-c", line.words.replace("@", PREFIX)],
            cwd=work,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        found.append(Told(line, done.returncode, done.stdout.replace(PREFIX, "@"), done.stderr))
    return found


@pytest.mark.skipif(shutil.which("dockerd") is None, reason="docker.io is not installed")
def test_docker(kata: Kata, tmp_path: Path) -> None:
    with docker_here("runc") as docker:
        archive = tmp_path / "busybox.tar"
        kata.ok("image", "save", "-o", str(archive), "busybox")
        docker.ok("load", "-i", str(archive))
        wrong = [str(each) for each in run_all(tmp_path, docker.command()) if not each.alike]
    assert not wrong, "\n".join(wrong)


def test_kata_runtime(kata: Kata, tmp_path: Path) -> None:
    for name in ("box", "job", "web"):
        kata.remove_later(f"{PREFIX}{name}")
    try:
        with open_netns(HOST):
            told = run_all(tmp_path, in_netns(HOST, kata_command()))
            kata.remove_started()  # while their network is there
    finally:
        kata("image", "rm", "-f", *(f"{PREFIX}lines:{number}" for number in range(1, 5)))
        kata("volume", "rm", "-f", f"{PREFIX}data")
    wrong = [str(each) for each in told if each.alike == bool(each.line.reason)]
    assert not wrong, "\n".join(wrong)
    assert sum(each.alike for each in told) >= LEAST_ALIKE
