"""Protobuf messages between containerd and its shim, made as those of katapod.rpc.pb are."""
