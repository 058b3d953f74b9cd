"""kata-osbuilder.sh and kata-osbuilder-generate.service: what they call, and that systemd accepts the unit."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from katapod.model.recipe import parse_recipe

FOLDER = Path(__file__).parents[3] / "packaging/osbuilder"
SCRIPT = FOLDER / "kata-osbuilder.sh"


def call(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a program in place of kata-runtime that shows its arguments."""
    program = tmp_path / "show"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "KATA_RUNTIME": str(program)}
    argv = ["sh", str(SCRIPT), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=60, check=False)


def test_flags_become_those_of_image_build(tmp_path: Path) -> None:
    assert call(tmp_path, "-c", "-k", "6.1").stdout == "image build --kernel 6.1\n"
    assert call(tmp_path, "-k", "6.1", "-f", "systemd", "-r", "/a b").stdout == (
        "image build --rebuild --kernel 6.1 --flavour systemd --recipe /a b\n"
    )


def test_the_running_kernel_is_the_default_if_its_modules_are_here(tmp_path: Path) -> None:
    running = os.uname().release
    has_modules = Path(f"/lib/modules/{running}/modules.dep").exists()
    expected = f"image build --kernel {running}\n" if has_modules else "image build\n"
    assert call(tmp_path, "-c").stdout == expected


@pytest.mark.parametrize("arguments", [("-x",), ("-c", "more"), ("-k",)])
def test_a_wrong_call_builds_nothing(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = call(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: kata-osbuilder.sh" in done.stderr


def test_help(tmp_path: Path) -> None:
    assert "only if there is no image" in call(tmp_path, "-h").stdout


def test_the_sample_recipe_is_one_and_so_is_each_of_its_keys() -> None:
    text = (FOLDER / "image.toml").read_text()
    assert parse_recipe(text.encode(), FOLDER / "image.toml").packages == ()
    keys = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#") and not line.startswith("# "))
    recipe = parse_recipe(keys.encode(), FOLDER / "image.toml")
    assert all((recipe.packages, recipe.kernel_modules, recipe.load_kernel_modules, recipe.hook, recipe.files))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "kata-osbuilder-generate.service"
    text = (FOLDER / unit.name).read_text()
    for line in ("Type=oneshot", "WantedBy=kubelet.service"):
        assert f"\n{line}\n" in text
    unit.write_text(text.replace("/usr/libexec/kata-containers/osbuilder", str(FOLDER)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert unit.name not in done.stderr
