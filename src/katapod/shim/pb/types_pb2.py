"""Messages of types.proto; see rpc/pb/_load.py. Types for checkers: types_pb2.pyi."""

from katapod.shim.pb._messages import MESSAGES

globals().update(MESSAGES.load(__name__))
