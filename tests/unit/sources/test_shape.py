"""The shape of the sources: no circle of files, no file, function or signature that has grown out of sight.

A function may be longer, or take more, where a comment `# long: WHY` stands on the line above it.
"""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import katapod

ROOT = Path(katapod.__file__).parent
LINES_MAX = 500
FUNCTION_LINES_MAX = 60
PARAMETERS_MAX = 8


@cache
def sources() -> dict[str, str]:
    """The text of each file, by its path below src/katapod/."""
    return {str(path.relative_to(ROOT)): path.read_text() for path in ROOT.rglob("*.py")}


def module_of(path: str) -> str:
    return ".".join(["katapod", *path.removesuffix(".py").removesuffix("__init__").strip("/").split("/")]).strip(".")


def imported(path: str, modules: dict[str, str]) -> set[str]:
    """The files that a file imports: at its top, in functions, and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(sources()[path])):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else str(node.module) for name in names]
        found |= {modules[name] for name in names if name in modules}
    return found


def test_no_circle_of_files() -> None:
    modules = {module_of(path): path for path in sources()}
    graph = {path: imported(path, modules) for path in sources()}
    assert len(graph) > 200
    assert sum(map(len, graph.values())) > 1000
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        raise AssertionError(f"files import each other: {' <- '.join(exc.args[1])}") from None


def test_no_file_is_too_long() -> None:
    lengths = {path: len(text.splitlines()) for path, text in sources().items()}
    long = {path: length for path, length in lengths.items() if length > LINES_MAX}
    assert not long, f"split by purpose what has more than {LINES_MAX} lines: {long}"


def functions(path: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(sources()[path])):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_excused(path: str, function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    above = sources()[path].splitlines()[first - 2].strip()
    return above.startswith("# long: ")


def test_no_function_is_too_long() -> None:
    long = [
        f"{path}: {function.name} has {length} lines"
        for path in sources()
        for function in functions(path)
        if (length := (function.end_lineno or 0) - function.lineno + 1) > FUNCTION_LINES_MAX
        and not is_excused(path, function)
    ]
    assert not long, long


def test_no_function_takes_too_much() -> None:
    long = []
    for path in sources():
        for function in functions(path):
            given = function.args
            names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            if names[:1] in (["self"], ["cls"]):
                del names[0]
            if len(names) > PARAMETERS_MAX and not is_excused(path, function):
                long.append(f"{path}: {function.name} takes {len(names)} parameters")
    assert not long, long
