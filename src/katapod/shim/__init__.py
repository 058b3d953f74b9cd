"""The door for containerd and CRI-O: `containerd-shim-kata-v2` (start, delete, and the server of a pod's tasks).

Holds the shim v2 contract: command line, ttrpc services, events, streams. What it asks for is done by katapod.sandbox.
`start` has to answer within 0.1 s: main.py and start.py import nothing that is not needed for that.
"""
