"""rpc: how programs talk: ttrpc frames, a client, a server, and the messages of the agent protocol.

`framing`, `status` and `pb` are what the guest agent imports too, so they stay small and know nothing
of asyncio. `client`, `server` and `agent` are the host's. Nothing here knows what a sandbox is.
"""
