"""kernel: thin bindings of Linux system calls that the standard library does not offer.

One module per family; each function is the system call with Python types and OSError. There is no policy here, and no
other room is imported, so that both the host and the guest agent can use it.
"""
