"""What the shim says about itself: to people (-v), and to containerd 2 (-info)."""

import sys

import katapod

__all__ = ["RUNTIME_NAME", "print_info", "print_version"]

RUNTIME_NAME = "io.containerd.kata.v2"


def print_version() -> None:
    print(f"containerd-shim-kata-v2 (Katapod) {katapod.__version__}: {RUNTIME_NAME}")


def print_info() -> None:
    """Write a serialized containerd.types.RuntimeInfo to standard output; the options on standard input are ours to
    ignore, since nothing that it says depends on them."""
    from katapod.shim.pb import runtime_pb2

    info = runtime_pb2.RuntimeInfo(name=RUNTIME_NAME)
    info.version.version = katapod.__version__
    sys.stdout.buffer.write(info.SerializeToString())
    sys.stdout.buffer.flush()
