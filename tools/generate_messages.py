"""Rebuild what is generated from the .proto files of each message set: its descriptors.binpb and .pyi stubs.

Run it after a change of a .proto file: `.venv/bin/python tools/generate_messages.py`. With --check it
writes nothing and fails when the generated files are out of date.
"""

import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

SRC = Path(__file__).resolve().parents[1] / "src"
SETS = (SRC / "katapod" / "rpc" / "pb", SRC / "katapod" / "shim" / "pb")


def generate(folder: Path, out: Path) -> None:
    """Write descriptors.binpb and the stubs of one set below `out`, laid out as below src/."""
    target = out / folder.relative_to(SRC)
    target.mkdir(parents=True, exist_ok=True)
    well_known = files("grpc_tools") / "_proto"
    protos = sorted(str(path.relative_to(SRC)) for path in folder.glob("*.proto"))
    arguments = [
        "protoc",
        f"-I{SRC}",
        f"-I{well_known}",
        "--include_imports",
        f"--descriptor_set_out={target / 'descriptors.binpb'}",
        f"--pyi_out={out}",
        *protos,
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("cannot compile the .proto files: see the message above")


def main() -> int:
    if "--check" not in sys.argv[1:]:
        for folder in SETS:
            generate(folder, SRC)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        for folder in SETS:
            generate(folder, Path(scratch))
        stale = [
            str(path.relative_to(scratch))
            for path in sorted(Path(scratch).rglob("*"))
            if path.is_file() and path.read_bytes() != (SRC / path.relative_to(scratch)).read_bytes()
        ]
    if stale:
        print(f"out of date: {', '.join(stale)}; run tools/generate_messages.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
