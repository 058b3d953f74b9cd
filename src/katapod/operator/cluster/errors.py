"""Errors of the cluster's side."""

from katapod.model.errors import KatapodError

__all__ = ["ClusterFailed"]


class ClusterFailed(KatapodError):
    """The API server refuses something, or cannot be reached; asking again later may help."""
