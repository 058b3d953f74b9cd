"""What a node is told beside the payload: its runtime handlers with their drop-ins, and what to measure."""

import hashlib
from typing import Annotated

import msgspec

from katapod.operator.names import HANDLER

__all__ = ["HandlerSpec", "NodeSettings", "default_settings"]


class HandlerSpec(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True, forbid_unknown_fields=True):
    """A runtime handler of the engine's. With drop-ins it has a configuration.toml of its own."""

    name: str
    drop_ins: tuple[str, ...] = ()  # TOML; a later one replaces keys of those before
    measure: bool = False  # what a sandbox takes beyond its containers' limits
    kept: bool = False  # it was asked for before, and pods may have it: its configuration is left as it is


class NodeSettings(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    handlers: Annotated[tuple[HandlerSpec, ...], msgspec.Meta(min_length=1)]

    def digest(self) -> str:
        """Which settings a node has; empty for those of a KataConfig that asks for nothing of this."""
        if self == default_settings():
            return ""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:12]


def default_settings() -> NodeSettings:
    return NodeSettings((HandlerSpec(HANDLER),))
