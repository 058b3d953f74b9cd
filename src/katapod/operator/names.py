"""Names that nodes and clusters agree about."""

HANDLER = "kata"
"""The runtime handler in the engine's configuration, which a RuntimeClass names."""
