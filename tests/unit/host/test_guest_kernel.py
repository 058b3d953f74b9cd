"""The libraries of a guest kernel that is a program."""

import json
import shutil
from pathlib import Path

import pytest

from katapod.host.guest_kernel import kernel_libraries


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program that is linked dynamically, in a directory of its own."""
    return Path(shutil.copy("/bin/true", tmp_path / "linux"))


async def test_ldd_tells_of_a_program_that_nobody_has_described(program: Path) -> None:
    libraries = await kernel_libraries(program)

    assert {"libc.so.6"} < {path.name for path in libraries}
    assert any(path.name.startswith("ld-linux") for path in libraries)
    assert all(path.is_file() for path in libraries)


async def test_the_manifest_beside_it_counts_also_through_a_link(program: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"kernel": "linux", "libraries": ["/lib/a.so", "/lib/b.so"]}))
    (tmp_path / "link").mkdir()
    link = tmp_path / "link" / "vmlinuz-uml.container"
    link.symlink_to(program)

    assert await kernel_libraries(link) == (Path("/lib/a.so"), Path("/lib/b.so"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kernel": "other", "libraries": ["/lib/a.so"]}', "\\xff"])
async def test_a_manifest_of_something_else_does_not_count(program: Path, content: str) -> None:
    (program.parent / "manifest.json").write_text(content)

    assert "libc.so.6" in {path.name for path in await kernel_libraries(program)}
