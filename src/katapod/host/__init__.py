"""host: effects on this machine, one module for each kind.

process (programs), qmp, qemu, virtiofsd, mounts, facts (what the host has), state (directories).
Each carries out a plan of `katapod.plan` and knows how to undo what it did; none decides anything.
"""
