"""Runs in the interpreter that goes into the guest, as a plain script: traces imports, compiles sources.

It must be that interpreter, since a .pyc is only good for the version that wrote it, and a process of its
own, so that what the builder has imported does not count. Reads one JSON object on stdin:

    {"do": "trace", "path": [directories], "modules": [names]}   answers [[name, file], ...]
    {"do": "compile", "files": [[source, output, name in tracebacks], ...]}   answers []
"""

import json
import sys


def trace(path: list[str], modules: list[str]) -> list[list[str]]:
    """Import `modules` with `path` as sys.path; list every module that came from a file.

    What this script imports for itself (json) is in the list too; the guest carries it in any case."""
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
        elif origin == "frozen" and name == "os":  # the interpreter looks for this file to find its library
            found.append([name, path[0] + "/os.py"])
    return found


def compile_files(files: list[list[str]]) -> None:
    """Write each .pyc without docstrings and asserts, and such that its source is never looked for."""
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
