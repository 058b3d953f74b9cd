"""The front end for containerd and CRI-O: `containerd-shim-kata-v2` (start, delete, and the task server of a pod).

Implements the shim v2 contract: command line, ttrpc services, events, streams. katapod.sandbox does the work. `start`
must answer within 0.1 s: main.py and start.py import nothing that this does not need.
"""
