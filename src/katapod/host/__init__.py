"""host: effects on this machine, one module for each kind.

process (programs), virtiofsd, mounts, own_mounts, cgroup, netns, cni, state (directories), facts (what the host has).
Each carries out a plan of `katapod.plan` and knows how to undo what it did; none decides anything.
"""
