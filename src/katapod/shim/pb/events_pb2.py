"""Messages of events.proto; see rpc/pb/_load.py. Types for checkers: events_pb2.pyi."""

from katapod.shim.pb._messages import MESSAGES

globals().update(MESSAGES.load(__name__))
