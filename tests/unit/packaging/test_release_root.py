"""tools/release-root: which release is the other one, what is copied into its root, and how it is called."""

import importlib.machinery
import importlib.util
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).parents[3] / "tools/release-root"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader = importlib.machinery.SourceFileLoader("release_root", str(PROGRAM))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("own", "other"), [("bookworm", "trixie"), ("trixie", "bookworm"), ("noble", "trixie"), ("", "trixie")]
)
def test_the_other_release(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, own: str, other: str) -> None:
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "x", "VERSION_CODENAME": own})
    assert tool.other_release() == other


def test_the_mirror_is_the_one_that_this_release_comes_from(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "apt-get"
    program.write_text(
        "#!/bin/sh\n"
        "echo http://mirror.example/debian-security/ bookworm-security main\n"
        "echo http://other.example/repo/ bookworm contrib\n"
        "echo http://mirror.example/debian/ bookworm main\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for own, mirror in (("bookworm", "http://mirror.example/debian/"), ("noble", "http://deb.debian.org/debian")):
        monkeypatch.setattr(tool, "own_release", lambda own=own: own)
        assert tool.own_mirror() == mirror


def test_sources_are_copied_as_they_are_and_built_things_stay(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    top, target = tmp_path / "the sources", tmp_path / "root"
    top.mkdir()
    for name, text in ((".gitignore", "build/\n"), ("committed", "old"), ("removed", ""), ("build/here", "")):
        (top / name).parent.mkdir(exist_ok=True)
        (top / name).write_text(text)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example", "-C", str(top)]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True, timeout=60)
    (top / "committed").write_text("new")
    (top / "removed").unlink()
    (top / "not yet").write_text("")
    (target / "build").mkdir(parents=True)
    (target / "build/there").write_text("")
    (target / "gone").write_text("")
    monkeypatch.setattr(tool, "TOP", top)
    for _ in range(2):
        tool.copy_sources(target)
        found = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
        assert found == [".gitignore", "build/there", "committed", "not yet"]
        assert (target / "committed").read_text() == "new"


@pytest.mark.parametrize("words", [[], ["sid", "smoke"], ["other"], ["other", "smoke", "--", "true"], ["other", "--"]])
def test_wrong_calls(words: list[str]) -> None:
    done = subprocess.run([PROGRAM, *words], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: release-root" in done.stderr
