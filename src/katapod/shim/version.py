"""What the shim says about itself: to people (-v), to containerd 2 (-info) and to CRI-O (features)."""

import json
import sys

import katapod

__all__ = ["RUNTIME_NAME", "print_features", "print_info", "print_version"]

RUNTIME_NAME = "io.containerd.kata.v2"
FEATURES_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"


def print_version() -> None:
    print(f"containerd-shim-kata-v2 (Katapod) {katapod.__version__}: {RUNTIME_NAME}")


def print_info() -> None:
    """Write a serialized containerd.types.RuntimeInfo to standard output. The options on standard input are ignored:
    nothing in the answer depends on them."""
    from katapod.plan.oci_features import oci_features
    from katapod.shim.pb import runtime_pb2

    info = runtime_pb2.RuntimeInfo(name=RUNTIME_NAME)
    info.version.version = katapod.__version__
    info.features.type_url, info.features.value = FEATURES_TYPE, json.dumps(oci_features()).encode()
    sys.stdout.buffer.write(info.SerializeToString())
    sys.stdout.buffer.flush()


def print_features() -> None:
    """Like `runc features`: CRI-O runs this for every runtime, shims included."""
    from katapod.plan.oci_features import oci_features

    print(json.dumps(oci_features(), indent=2))
