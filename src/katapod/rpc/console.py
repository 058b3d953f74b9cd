"""Constants of the debug console that host and guest share.

A shell of the console is an exec of the agent protocol whose container is the VM itself. The console has a connection
of its own: the second virtio-serial port, or a vsock port.
"""

__all__ = ["CONSOLE_SERVICE_VPORT", "CONSOLE_VPORT", "VM_ID"]

VM_ID = "@vm"
"""Used in place of a container id; no container id may begin with "@"."""

CONSOLE_VPORT = 1026
"""vsock: a raw shell per connection, as upstream's agent and kata-runtime use it."""

CONSOLE_SERVICE_VPORT = 1027
"""vsock: ttrpc, as on the virtio-serial port. Not in upstream."""
