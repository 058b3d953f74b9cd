"""Messages of task.proto; see rpc/pb/_load.py. Types for checkers: task_pb2.pyi."""

from katapod.shim.pb._messages import MESSAGES

globals().update(MESSAGES.load(__name__))
