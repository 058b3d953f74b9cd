"""Why a node cannot have, or cannot lose, the runtime.

NodeError
  StageFailed    a stage that has been undone; `stage` is its name
"""

from katapod.model.errors import KatapodError

__all__ = ["NodeError", "StageFailed"]


class NodeError(KatapodError):
    """Says what cannot be done, why, and what to do about it."""


class StageFailed(NodeError):
    def __init__(self, stage: str, cause: str) -> None:
        super().__init__(cause)
        self.stage = stage
