"""`image build`: which images are built, and what is only a note."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from katapod.cli import guest_images
from katapod.cli.guest_images import _build_for_uml
from katapod.cli.settings import Globals
from katapod.model.errors import UsageError
from katapod.osbuilder import ImageRequest, KernelMissing


async def test_a_node_without_user_mode_linux_is_told_so_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await _build_for_uml(ImageRequest(vmm="uml", cache_dir=tmp_path, system_root=tmp_path), needed=False)

    said = capsys.readouterr()
    assert "note: no guest image for User-mode Linux: cannot find User-mode Linux" in said.err
    assert "apt install user-mode-linux" in said.err
    assert said.out == ""


async def test_who_asks_for_that_image_alone_gets_an_error(tmp_path: Path) -> None:
    with pytest.raises(KernelMissing, match="cannot find User-mode Linux"):
        await _build_for_uml(ImageRequest(vmm="uml", cache_dir=tmp_path, system_root=tmp_path), needed=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vmm", "xen"], "cannot use --vmm xen: it must be qemu or uml"),
        (["--vmm", "uml", "--kernel", "6.1.0"], "cannot use --kernel with --vmm uml"),
    ],
)
def test_flags_that_say_nothing_together_are_refused(words: list[str], said: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: others are refused before")
    result = CliRunner().invoke(guest_images.build, words, obj=Globals(), standalone_mode=False)

    assert isinstance(result.exception, UsageError)
    assert said in str(result.exception)
