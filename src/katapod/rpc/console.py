"""What host and guest agree on about the debug console, beyond the messages.

A shell of the console is an exec of the agent protocol whose container is the VM itself. It is asked for on a
connection of its own: the second virtio-serial port, or a vsock port.
"""

__all__ = ["CONSOLE_SERVICE_VPORT", "CONSOLE_VPORT", "VM_ID"]

VM_ID = "@vm"
"""In the place of a container's id, none of which may begin so."""

CONSOLE_VPORT = 1026
"""vsock: a raw shell for each connection, as upstream's agent and kata-runtime have it."""

CONSOLE_SERVICE_VPORT = 1027
"""vsock: ttrpc, as on the virtio-serial port. Katapod's own."""
