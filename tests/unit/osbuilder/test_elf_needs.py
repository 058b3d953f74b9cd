"""Leaving a library out of a real program of this host, and of files that are no such thing."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from katapod.osbuilder.elf_needs import ElfFormatError, drop_needed


def needed(program: Path) -> list[str]:
    done = subprocess.run(["readelf", "-d", str(program)], capture_output=True, text=True, check=True)
    return re.findall(r"NEEDED.*\[(.+)\]", done.stdout)


@pytest.fixture
def crun() -> Path:
    path = shutil.which("crun")
    if path is None or shutil.which("readelf") is None or "libsystemd.so.0" not in needed(Path(path)):
        pytest.skip("no crun linked with libsystemd, or no readelf")
    return Path(path).resolve()


def test_a_program_runs_without_the_library_it_was_linked_with(crun: Path, tmp_path: Path) -> None:
    slim = tmp_path / "crun"
    slim.write_bytes(drop_needed(crun.read_bytes(), "libsystemd.so.0"))
    slim.chmod(0o755)

    assert needed(slim) == [library for library in needed(crun) if library != "libsystemd.so.0"]
    # LD_BIND_NOW: every symbol is resolved at the start, not when it is called.
    done = subprocess.run([slim, "--version"], capture_output=True, text=True, check=False, env={"LD_BIND_NOW": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    libraries = subprocess.run(["ldd", str(slim)], capture_output=True, text=True, check=True).stdout
    assert "libsystemd" not in libraries
    assert "libgcrypt" not in libraries


def test_a_library_that_is_used_stays_if_only_unused_ones_may_go(crun: Path) -> None:
    data = crun.read_bytes()

    assert drop_needed(data, "libsystemd.so.0", only_unused=True) == data


def test_a_file_without_that_need_stays_as_it_is(crun: Path) -> None:
    data = crun.read_bytes()

    assert drop_needed(data, "libnothing.so.1") is data


@pytest.mark.parametrize(
    "content", [b"#!/bin/sh\n", b"", b"\x7fELF\x01\x01" + bytes(100), b"\x7fELF\x02\x01" + bytes(20)]
)
def test_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(ElfFormatError):
        drop_needed(content, "libc.so.6")
