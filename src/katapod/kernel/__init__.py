"""kernel: thin bindings of Linux system calls that the standard library does not offer.

One module a family; each function is the system call with Python types and OSError. No policy, no
other room is imported, so that the host and the guest agent can both use it.
"""
