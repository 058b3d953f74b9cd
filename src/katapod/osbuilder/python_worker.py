"""A script for the interpreter that the guest gets: traces imports, compiles sources.

It must be that interpreter, since a .pyc is valid only for the version that wrote it, and a separate process, so that
the builder's own imports do not count. Reads one JSON object on stdin:

    {"do": "trace", "path": [directories], "modules": [names]}   answers [[name, file], ...]
    {"do": "compile", "files": [[source, output, name in tracebacks], ...]}   answers []
"""

import json
import sys


def trace(path: list[str], modules: list[str]) -> list[list[str]]:
    """Import `modules` with `path` as sys.path; list every module that was loaded from a file.

    This script's own import (json) is listed too; the guest has it anyway."""
    import importlib

    sys.path[:] = path
    for name in modules:
        importlib.import_module(name)
    found = []
    for name, module in sorted(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        origin = getattr(spec, "origin", None)
        if spec is None or name == "__main__":
            continue
        if spec.has_location and origin:
            found.append([name, origin])
        elif origin == "frozen" and name == "os":  # the interpreter locates its library by this file
            found.append([name, path[0] + "/os.py"])
    return found


def compile_files(files: list[list[str]]) -> None:
    """Write each .pyc without docstrings and asserts, and without a check of its source."""
    import py_compile

    for source, output, shown_name in files:
        py_compile.compile(
            source,
            cfile=output,
            dfile=shown_name,
            doraise=True,
            optimize=2,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )


def main() -> None:
    order = json.load(sys.stdin)
    if order["do"] == "trace":
        json.dump(trace(order["path"], order["modules"]), sys.stdout)
    else:
        compile_files(order["files"])
        json.dump([], sys.stdout)


if __name__ == "__main__":
    main()
