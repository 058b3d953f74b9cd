"""Message classes straight from the compiled descriptors.

The usual generated modules import some forty modules of google.protobuf. In the guest, under software
emulation, that costs 0.45 s of a boot; the C core of protobuf (upb) alone costs 0.1 s. It can build
message classes from a descriptor set by itself, so that is what we ask of it, on both sides, and fall
back to the public API where the C core is absent. docs/adr/0003-messages.md has the figures.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # without importing typing, which the guest would pay for
    from typing import Any

__all__ = ["MessageSet", "class_of", "load"]


def _open_pool() -> tuple[Any, Any]:
    """Return (descriptor pool, function from message descriptor to class)."""
    try:
        from google._upb import _message
    except ImportError:
        from google.protobuf import descriptor_pool, message_factory

        return descriptor_pool.DescriptorPool(), message_factory.GetMessageClass
    from google.protobuf.message import Message

    def make_class(descriptor: Any) -> Any:
        return _message.MessageMeta(descriptor.name, (Message,), {"DESCRIPTOR": descriptor, "__module__": __name__})

    return _message.DescriptorPool(), make_class


def _serialized_files(path: str) -> list[bytes]:
    """Split a FileDescriptorSet (repeated field 1) into its files."""
    with open(path, "rb") as handle:
        data = handle.read()
    found: list[bytes] = []
    position = 0
    while position < len(data):
        position += 1  # the tag of field 1, length delimited: always one byte, 0x0a
        length = shift = 0
        while True:
            byte = data[position]
            position += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        found.append(data[position : position + length])
        position += length
    return found


class MessageSet:
    """The messages of one directory of .proto files, compiled to its descriptors.binpb.

    Sets know nothing of each other: what only the host speaks costs the guest nothing.
    """

    def __init__(self, directory: str, proto_directory: str) -> None:
        """`proto_directory`: how the .proto files are named in imports, such as katapod/rpc/pb."""
        self._pool, self._make_class = _open_pool()
        self._proto_directory = proto_directory
        files = [self._pool.AddSerializedFile(raw) for raw in _serialized_files(f"{directory}/descriptors.binpb")]
        self._files = {descriptor.name: descriptor for descriptor in files}
        self._classes: dict[str, Any] = {}

    def class_of(self, descriptor: Any) -> Any:
        """Return the class of a message, of whichever file of the set: one class each."""
        if descriptor.full_name not in self._classes:
            self._classes[descriptor.full_name] = self._make_class(descriptor)
        return self._classes[descriptor.full_name]

    def load(self, module_name: str) -> dict[str, Any]:
        """Return the names that the module `module_name` (PACKAGE.X_pb2) offers: DESCRIPTOR, messages, enum values.

        Raises KeyError if X.proto is not in the set.
        """
        stem = module_name.rpartition(".")[2].removesuffix("_pb2")
        proto = "google/protobuf/empty.proto" if stem == "empty" else f"{self._proto_directory}/{stem}.proto"
        descriptor = self._files[proto]
        names: dict[str, Any] = {"DESCRIPTOR": descriptor}
        for name, message in descriptor.message_types_by_name.items():
            names[name] = self.class_of(message)
        for enum in descriptor.enum_types_by_name.values():
            for value in enum.values:
                names[value.name] = value.number
        return names


_MESSAGES = MessageSet(__file__.rpartition("/")[0], "katapod/rpc/pb")
class_of = _MESSAGES.class_of
load = _MESSAGES.load


if sys.version_info < (3, 11):  # the builder puts this interpreter into the guest as well
    raise ImportError("katapod needs Python 3.11 or newer")
