"""Compile what is written in C: each source to the file beside it, which is kept, as hosts need no compiler.

    .venv/bin/python tools/build_native.py            compile
    .venv/bin/python tools/build_native.py --check    whether the files were made from the sources as they are

Needs gcc and x86_64. What a file was made from is its build id (ld(1), --build-id): the SHA-256 of the source.
"""

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

HOST = Path(__file__).resolve().parents[1] / "src/katapod/host"
COMPILER = ("-O2", "-nostdlib", "-ffreestanding", "-fvisibility=hidden", "-fno-stack-protector")
COMPILER += ("-fno-asynchronous-unwind-tables", "-fcf-protection=none", "-fno-tree-loop-distribute-patterns")
COMPILER += ("-Wall", "-Wextra", "-Werror")
LINKER = ("-s", "-z,noseparate-code", "-z,relro", "-z,now", "-z,noexecstack", "--hash-style=gnu")
LIBRARY, PROGRAM = ("-fPIC", "-shared"), ("-fno-pic", "-static", "-no-pie")
FILES = (
    (HOST / "regset.c", HOST / "libregset.so.1", LIBRARY, 0o644),
    (HOST / "proxy.c", HOST / "katapod-proxy", PROGRAM, 0o755),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = 0
    for source, made, kind, mode in FILES:
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        if not check:
            linked = ",".join((*LINKER, f"--build-id=0x{digest}"))
            subprocess.run(["gcc", *COMPILER, *kind, f"-Wl,{linked}", "-o", made, source], check=True)
            made.chmod(mode)
        elif bytes.fromhex(digest) not in made.read_bytes():
            print(f"{made} was not made from {source} as it is: run {sys.argv[0]}", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
