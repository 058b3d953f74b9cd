"""Katapod: a VM-isolated container runtime."""

__version__ = "0.1.0"
