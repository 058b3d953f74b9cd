"""Messages of inspection.proto; see _load.py. Types for checkers: inspection_pb2.pyi."""

from katapod.rpc.pb._load import load

globals().update(load(__name__))
