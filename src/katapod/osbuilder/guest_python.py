"""Which Python files the guest needs: the imports of the agent, followed statically and by trial.

Statically, our own packages are searched for imports, including those inside functions: this is cheap, and part of the
image's key. By trial, all of these are imported in a fresh interpreter, whose list of modules shows what they pull in
from the standard library and from other packages.
"""

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from msgspec import Struct

from katapod.host.process import ProcessFailed, run
from katapod.osbuilder.errors import OsbuilderError
from katapod.plan.guest_image import PYTHON_ROOT, PythonFile, PythonFileKind

__all__ = ["Interpreter", "OwnSources", "compile_python", "find_interpreter", "find_own_sources", "trace_python"]

WORKER = Path(__file__).with_name("python_worker.py")
DATA_SUFFIXES = frozenset({".binpb"})
PACKAGE_DIRS = frozenset({"site-packages", "dist-packages"})

ALWAYS_MODULES = (
    # What an interpreter loads by itself, or inside functions of the standard library, where tracing imports does not
    # show it.
    "encodings.ascii",
    "encodings.latin_1",
    "encodings.utf_8",
    "json",
    "linecache",
    "os",
    "tokenize",
    "traceback",
    "warnings",
)


class Interpreter(Struct, frozen=True):
    """The Python that runs the builder, without the virtual environment around it."""

    binary: Path
    library: Path  # the standard library
    extensions: Path  # its extension modules

    @property
    def path(self) -> tuple[str, ...]:
        return (str(self.library), str(self.extensions))


class OwnSources(Struct, frozen=True):
    """The closure of the agent's imports within its own packages, and what these import from elsewhere."""

    root: Path  # the directory that holds the top package
    modules: tuple[tuple[str, Path], ...]
    data: tuple[Path, ...]
    foreign: tuple[str, ...]


def find_interpreter() -> Interpreter:
    """Raises OsbuilderError if the location of the running Python is unknown."""
    binary = Path(getattr(sys, "_base_executable", "") or sys.executable).resolve()
    library = Path(sysconfig.get_path("stdlib"))
    if not binary.is_file() or not library.is_dir():
        raise OsbuilderError(f"cannot find the Python that runs this program: {binary}, {library}")
    return Interpreter(binary, library, library / "lib-dynload")


def find_own_sources(packages: Sequence[str], root: Path) -> OwnSources:
    """Follow the imports of `packages` (all their modules) through everything under `root`.

    Raises OsbuilderError for a package that is missing or does not parse.
    """
    # In an installation `root` is a site-packages directory, with packages that are not ours.
    tops = {package.split(".")[0] for package in packages}
    pending: list[str] = []
    for package in packages:
        directory = root.joinpath(*package.split("."))
        if not (directory / "__init__.py").is_file():
            raise OsbuilderError(f"cannot build the guest image: {directory} is not a Python package")
        # Not __main__: importing it runs it.
        files = (path for path in sorted(directory.rglob("*.py")) if path.name != "__main__.py")
        pending += [_name_of(path, root) for path in files]
    modules: dict[str, Path] = {}
    foreign: set[str] = set()
    while pending:
        name = pending.pop()
        if name in modules:
            continue
        if name.split(".")[0] not in tops:
            foreign.add(name)
            continue
        path = _file_of(name, root)
        if path is None:
            if not _is_attribute(name, root):
                foreign.add(name)  # such as an extension module
            continue
        modules[name] = path
        if "." in name:
            pending.append(name.rpartition(".")[0])
        pending += _imports(name, path)
    data = {
        file
        for directory in {path.parent for path in modules.values()}
        for file in directory.iterdir()
        if file.suffix in DATA_SUFFIXES
    }
    importable = sorted(name for name in foreign if _resolves(name))
    return OwnSources(root, tuple(sorted(modules.items())), tuple(sorted(data)), tuple(importable))


async def trace_python(interpreter: Interpreter, own: OwnSources) -> tuple[PythonFile, ...]:
    """Import everything in a fresh interpreter and map each file to its place in the guest."""
    roots = sorted({str(_root_of(name)) for name in own.foreign if not _is_standard(name)} - {"."})
    order = {
        "do": "trace",
        "path": [*interpreter.path, str(own.root), *roots],
        "modules": [*ALWAYS_MODULES, *own.foreign, *(name for name, _ in own.modules)],
    }
    found = json.loads(await _work(interpreter, order))
    known = dict(own.modules)
    tops = {name.split(".")[0] for name in known}
    files: dict[str, PythonFile] = {}
    for name, origin in found:
        if name.split(".")[0] in tops and name not in known and origin.endswith(".py"):
            raise OsbuilderError(
                f"cannot key the guest image: {name} is imported dynamically",
                hint="use an import statement, so that a change of the module rebuilds the image",
            )
        file = _place(Path(origin), interpreter, [str(own.root), *roots])
        files[file.target] = file
    for data_path in own.data:
        target = f"{PYTHON_ROOT}/{data_path.relative_to(own.root)}"
        files[target] = PythonFile(str(data_path), target, PythonFileKind.DATA)
    return tuple(files[target] for target in sorted(files))


async def compile_python(interpreter: Interpreter, files: Sequence[PythonFile], stage: Path) -> None:
    """Write the .pyc files below `stage`, each where the guest expects it."""
    compiled = [file for file in files if file.kind is PythonFileKind.COMPILE]
    outputs = [(file, stage / file.target.lstrip("/")) for file in compiled]
    for directory in {output.parent for _, output in outputs}:
        directory.mkdir(parents=True, exist_ok=True)
    listed = [[file.source, str(output), file.target.removesuffix("c")] for file, output in outputs]
    await _work(interpreter, {"do": "compile", "files": listed})


async def _work(interpreter: Interpreter, order: Mapping[str, object]) -> str:
    # PYTHONHASHSEED determines the order of constants in sets, and so the bytes of a .pyc.
    try:
        completed = await run(
            [str(interpreter.binary), "-SsPB", str(WORKER)],
            input=json.dumps(order).encode(),
            env={"PYTHONHASHSEED": "0"},
            timeout_s=120,
        )
    except ProcessFailed as exc:
        raise OsbuilderError(f"cannot {order['do']} the agent's Python modules: {exc}") from exc
    return completed.stdout


def _place(origin: Path, interpreter: Interpreter, roots: Sequence[str]) -> PythonFile:
    if origin.is_relative_to(interpreter.library) and not PACKAGE_DIRS & set(origin.parts):
        target = str(origin)
    else:
        root = next((root for root in roots if origin.is_relative_to(root)), None)
        if root is None:
            raise OsbuilderError(f"cannot place {origin} in the guest: it is in no directory of sys.path")
        target = f"{PYTHON_ROOT}/{origin.relative_to(root)}"
    if origin.suffix == ".py":
        return PythonFile(str(origin), target + "c", PythonFileKind.COMPILE)
    return PythonFile(str(origin), target, PythonFileKind.LIBRARY)


def _name_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _file_of(name: str, root: Path) -> Path | None:
    base = root.joinpath(*name.split("."))
    for candidate in (base / "__init__.py", base.with_name(base.name + ".py")):
        if candidate.is_file():
            return candidate
    return None


def _is_attribute(name: str, root: Path) -> bool:
    """Whether `name` is something inside one of our modules, as "a.b.C" of "from a.b import C" is."""
    return "." in name and _file_of(name.rpartition(".")[0], root) is not None


def _imports(name: str, path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as exc:
        raise OsbuilderError(f"cannot read {path}: {exc}") from exc
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: list[str] = []
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            found.append(base)
            found += [f"{base}.{alias.name}" for alias in node.names if alias.name != "*"]
    return found


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node, except for code that never runs in the guest: imports for type checkers, and fallbacks for a missing
    package (`except ImportError`), as it is not missing."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.ExceptHandler) and child.type and "ImportError" in ast.unparse(child.type):
            continue
        yield child
        yield from _statements(child)


def _is_standard(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names


def _resolves(name: str) -> bool:
    """Whether `name` is a module (and not a class or function of one) that this interpreter finds."""
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def _root_of(name: str) -> Path:
    """The directory of sys.path under which the module `name` was found."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        return Path()  # a namespace package: see its modules
    origin = Path(spec.origin)
    depth = len(name.split(".")) + (1 if origin.name == "__init__.py" else 0)
    return origin.parents[depth - 1]
