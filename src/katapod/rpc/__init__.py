"""rpc: ttrpc frames, client and server, the messages and the client of the agent protocol, and HTTP.

The guest agent imports `framing`, `status` and `pb` too, so these stay small and do not use asyncio. `client`,
`server`, `agent`, `call_times` and `http` are for the host. Nothing here knows what a sandbox is.
"""
