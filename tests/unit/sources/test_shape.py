"""The shape of the sources: no circle of files, no file, function or signature that has grown out of sight.

A function may be longer, or take more, where a comment `# long: WHY` stands on the line above it.
"""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

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


TASK_OWNER = "tasks.py"
TASKS_ELSEWHERE: dict[str, str] = {}
"""Files that may start tasks themselves, and why."""


def task_groups(tree: ast.AST) -> set[str]:
    """Names of task groups: `async with asyncio.TaskGroup() as NAME`, or a parameter of that type."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.withitem) and isinstance(node.optional_vars, ast.Name):
            if isinstance(node.context_expr, ast.Call) and ast.unparse(node.context_expr.func) == "asyncio.TaskGroup":
                found.add(node.optional_vars.id)
        elif isinstance(node, ast.arg) and node.annotation and ast.unparse(node.annotation) == "asyncio.TaskGroup":
            found.add(node.arg)
    return found


def unowned_tasks(text: str) -> list[str]:
    """Calls that start a task for which nobody waits for certain: a gather that fails goes on without the others."""
    tree = ast.parse(text)
    groups, found = task_groups(tree), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute | ast.Name):
            continue
        name = node.attr if isinstance(node, ast.Attribute) else node.id
        whole = name in ("create_task", "ensure_future")
        if whole and isinstance(node, ast.Attribute) and ast.unparse(node.value) in groups:
            continue
        if whole or (name == "gather" and not waits_for_all(tree, node)):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def waits_for_all(tree: ast.AST, function: ast.expr) -> bool:
    """Whether `function`, a gather, is called with return_exceptions=True."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.func is function]
    keywords = [keyword for call in calls for keyword in call.keywords]
    return any(each.arg == "return_exceptions" and ast.unparse(each.value) == "True" for each in keywords)


def test_every_task_has_an_owner() -> None:
    found = {path: unowned_tasks(text) for path, text in sources().items() if path != TASK_OWNER}
    left = {path: calls for path, calls in found.items() if calls and path not in TASKS_ELSEWHERE}
    assert not left, f"use katapod.tasks, so that somebody awaits them: {left}"
    stale = [path for path in TASKS_ELSEWHERE if not found.get(path)]
    assert not stale, f"they start no tasks any more: {stale}"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("task = asyncio.create_task(work())", 1),
        ("loop.create_task(work())", 1),
        ("start = asyncio.ensure_future", 1),
        ("from asyncio import create_task\ncreate_task(work())", 1),
        ("await asyncio.gather(one(), other())", 1),
        ("await asyncio.gather(one(), return_exceptions=False)", 1),
        ("await asyncio.gather(one(), return_exceptions=True)", 0),
        ("async def f():\n async with asyncio.TaskGroup() as group:\n  group.create_task(work())", 0),
        ("def f(group: asyncio.TaskGroup):\n group.create_task(work())", 0),
        ("background.start(work(), name='work')", 0),
    ],
)
def test_what_counts_as_a_task_without_an_owner(text: str, count: int) -> None:
    assert len(unowned_tasks(text)) == count


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
