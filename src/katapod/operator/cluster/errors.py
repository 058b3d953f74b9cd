"""Errors of the cluster's side."""

from katapod.model.errors import KatapodError

__all__ = ["ClusterFailed", "EvictionRefused"]


class ClusterFailed(KatapodError):
    """The API server refuses something, or cannot be reached; asking again later may help."""


class EvictionRefused(ClusterFailed):
    """A pod may not be evicted now, as its PodDisruptionBudget says."""
