"""sandbox: the life of a sandbox (one VM), of its containers and execs, and their removal from disk.

All entry points (command line, OCI runtime, shim) call this room and own no logic that another needs.
  planning   configuration and requests to plans        proof     which accelerator boots guests here
  lifecycle  open a sandbox, watch it, close it         container containers and execs inside
  stdio      carry bytes between processes and fds      control   the supervisor's socket for other commands
  recovery   remove what a dead supervisor left behind       states    the legal moves
"""
