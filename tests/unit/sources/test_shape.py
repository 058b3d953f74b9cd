"""The shape of the sources: no circle of files, no file, function or signature that has grown out of sight.

A function may be longer, or take more, where a comment `# long: WHY` stands on the line above it.
"""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

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


class Function(NamedTuple):
    name: str
    lines: int
    parameters: int  # without self
    is_excused: bool


class Shape(NamedTuple):
    """What the tests ask of a file. Its tree is made once, which takes longest, and not kept."""

    imports: list[tuple[str, str]]  # a name, and the module that has it if it is none itself
    functions: list[Function]
    tasks: list[str]  # see unowned_tasks()


@cache
def shape_of(path: str) -> Shape:
    text = sources()[path]
    lines = text.splitlines()
    nodes = list(ast.walk(ast.parse(text)))
    imports = []
    for node in nodes:
        if isinstance(node, ast.Import):
            imports += [(alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports += [(f"{node.module}.{alias.name}", str(node.module)) for alias in node.names]
    functions = [function_of(node, lines) for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return Shape(imports, functions, unowned_tasks(nodes))


def imported(path: str, modules: dict[str, str]) -> set[str]:
    """The files that a file imports: at its top, in functions, and for type checkers."""
    names = [name if name in modules else module for name, module in shape_of(path).imports]
    return {modules[name] for name in names if name in modules}


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


def function_of(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Function:
    given = node.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    if names[:1] in (["self"], ["cls"]):
        del names[0]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    is_excused = lines[first - 2].strip().startswith("# long: ")
    return Function(node.name, (node.end_lineno or 0) - node.lineno + 1, len(names), is_excused)


TASK_OWNER = "tasks.py"
TASKS_ELSEWHERE: dict[str, str] = {}
"""Files that may start tasks themselves, and why."""


def task_groups(nodes: list[ast.AST]) -> set[str]:
    """Names of task groups: `async with asyncio.TaskGroup() as NAME`, or a parameter of that type."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.withitem) and isinstance(node.optional_vars, ast.Name):
            if isinstance(node.context_expr, ast.Call) and ast.unparse(node.context_expr.func) == "asyncio.TaskGroup":
                found.add(node.optional_vars.id)
        elif isinstance(node, ast.arg) and node.annotation and ast.unparse(node.annotation) == "asyncio.TaskGroup":
            found.add(node.arg)
    return found


def unowned_tasks(nodes: list[ast.AST]) -> list[str]:
    """Calls that start a task for which nobody waits for certain: a gather that fails goes on without the others."""
    groups, found = task_groups(nodes), []
    for node in nodes:
        if not isinstance(node, ast.Attribute | ast.Name):
            continue
        name = node.attr if isinstance(node, ast.Attribute) else node.id
        whole = name in ("create_task", "ensure_future")
        if whole and isinstance(node, ast.Attribute) and ast.unparse(node.value) in groups:
            continue
        if whole or (name == "gather" and not waits_for_all(nodes, node)):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def waits_for_all(nodes: list[ast.AST], function: ast.expr) -> bool:
    """Whether `function`, a gather, is called with return_exceptions=True."""
    calls = [node for node in nodes if isinstance(node, ast.Call) and node.func is function]
    keywords = [keyword for call in calls for keyword in call.keywords]
    return any(each.arg == "return_exceptions" and ast.unparse(each.value) == "True" for each in keywords)


def test_every_task_has_an_owner() -> None:
    found = {path: shape_of(path).tasks for path in sources() if path != TASK_OWNER}
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
    assert len(unowned_tasks(list(ast.walk(ast.parse(text))))) == count


def unexcused_functions() -> Iterator[tuple[str, Function]]:
    return ((path, function) for path in sources() for function in shape_of(path).functions if not function.is_excused)


def test_no_function_is_too_long() -> None:
    long = [
        f"{path}: {function.name} has {function.lines} lines"
        for path, function in unexcused_functions()
        if function.lines > FUNCTION_LINES_MAX
    ]
    assert not long, long


def test_no_function_takes_too_much() -> None:
    long = [
        f"{path}: {function.name} takes {function.parameters} parameters"
        for path, function in unexcused_functions()
        if function.parameters > PARAMETERS_MAX
    ]
    assert not long, long
