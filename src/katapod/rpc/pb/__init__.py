"""Protobuf messages of the protocols that Katapod speaks.

`*.proto` are the sources; `descriptors.binpb` and the `.pyi` stubs are generated from them by
tools/generate_messages.py, and the `*_pb2` modules build their classes from the descriptors at import.
"""
