"""Which Python files go into the guest, with small package trees and the real interpreter."""

import marshal
from pathlib import Path

import pytest

from katapod.osbuilder.errors import OsbuilderError
from katapod.osbuilder.guest_python import compile_python, find_interpreter, find_own_sources, trace_python
from katapod.plan.guest_image import PythonFileKind

TREE = {
    "house/__init__.py": "",
    "house/agent/__init__.py": "",
    "house/agent/main.py": (
        "from __future__ import annotations\n"
        "from typing import TYPE_CHECKING\n"
        "import struct\n"
        "from house.model import NAMES\n"
        "if TYPE_CHECKING:\n    from house.heavy import Thing\n"
        "try:\n    import house.fast\nexcept ImportError:\n    import house.slow\n"
        "def main():\n    from house.lazy import work\n    import colorsys\n    return work\n"
    ),
    "house/agent/__main__.py": "raise SystemExit('imported')\n",
    "house/model.py": "NAMES = frozenset({'a', 'b', 'c', 'd'})\n",
    "house/fast.py": "",
    "house/slow.py": "raise RuntimeError('never here')\n",
    "house/lazy/__init__.py": "from .deep import work\n",
    "house/lazy/deep.py": "def work():\n    '''A docstring.'''\n",
    "house/lazy/table.binpb": "data",
    "house/heavy.py": "import asyncio\nclass Thing: ...\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, content in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


def test_imports_are_followed_into_functions_but_not_for_type_checkers(tree: Path) -> None:
    own = find_own_sources(["house.agent"], tree)

    assert [name for name, _ in own.modules] == [
        "house",
        "house.agent",
        "house.agent.main",
        "house.fast",
        "house.lazy",
        "house.lazy.deep",
        "house.model",
    ]
    assert [path.name for path in own.data] == ["table.binpb"]
    assert {"struct", "colorsys"} <= set(own.foreign)


def test_a_package_beside_ours_is_foreign(tree: Path) -> None:
    """As in site-packages."""
    (tree / "other").mkdir()
    (tree / "other/__init__.py").write_text("import tkinter\n")
    (tree / "house/fast.py").write_text("import other\n")

    own = find_own_sources(["house.agent"], tree)

    assert "other" not in dict(own.modules)
    assert "tkinter" not in own.foreign


async def test_every_file_has_its_place_in_the_guest(tree: Path) -> None:
    interpreter = find_interpreter()

    files = await trace_python(interpreter, find_own_sources(["house.agent"], tree))

    targets = {file.target: file.kind for file in files}
    assert targets["/usr/lib/katapod/house/lazy/deep.pyc"] is PythonFileKind.COMPILE
    assert targets["/usr/lib/katapod/house/lazy/table.binpb"] is PythonFileKind.DATA
    assert targets[f"{interpreter.library}/colorsys.pyc"] is PythonFileKind.COMPILE
    assert targets[f"{interpreter.library}/traceback.pyc"] is PythonFileKind.COMPILE
    assert not any("asyncio" in target or "heavy" in target or "__main__" in target for target in targets)


async def test_compiled_files_are_the_same_each_time_and_need_no_source(tree: Path, tmp_path: Path) -> None:
    interpreter = find_interpreter()
    files = [f for f in await trace_python(interpreter, find_own_sources(["house.agent"], tree)) if "house" in f.target]

    for stage in ("one", "two"):
        await compile_python(interpreter, files, tmp_path / stage)

    one = sorted(path for path in (tmp_path / "one").rglob("*.pyc"))
    assert len(one) == 7
    for path in one:
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    deep = (tmp_path / "one/usr/lib/katapod/house/lazy/deep.pyc").read_bytes()
    assert deep[4:8] == b"\1\0\0\0"  # PEP 552: unchecked hash
    assert marshal.loads(deep[16:]).co_filename == "/usr/lib/katapod/house/lazy/deep.py"
    assert b"A docstring." not in deep


async def test_an_import_that_the_key_cannot_see_is_refused(tree: Path) -> None:
    (tree / "house/fast.py").write_text("import importlib\nimportlib.import_module('house.heavy')\n")

    with pytest.raises(OsbuilderError, match=r"house\.heavy is imported dynamically"):
        await trace_python(find_interpreter(), find_own_sources(["house.agent"], tree))


async def test_a_module_that_does_not_import_is_an_error_with_its_cause(tree: Path) -> None:
    (tree / "house/fast.py").write_text("import no_such_package_at_all\n")

    with pytest.raises(OsbuilderError, match="no_such_package_at_all"):
        await trace_python(find_interpreter(), find_own_sources(["house.agent"], tree))


def test_no_package_and_broken_source_are_errors_that_name_the_file(tree: Path) -> None:
    with pytest.raises(OsbuilderError, match=r"house/none is not a Python package"):
        find_own_sources(["house.none"], tree)
    (tree / "house/fast.py").write_text("def (\n")
    with pytest.raises(OsbuilderError, match=r"cannot read .*house/fast\.py"):
        find_own_sources(["house.agent"], tree)
