"""The shim's own set of messages: the guest never loads it."""

from katapod.rpc.pb._load import MessageSet

__all__ = ["MESSAGES"]

MESSAGES = MessageSet(__file__.rpartition("/")[0], "katapod/shim/pb")
