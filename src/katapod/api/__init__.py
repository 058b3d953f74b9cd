"""Katapod as a Python library: what is behind the names of `import katapod`, and no names of its own.

A thin entry point like the others: it turns parameters into the requests of the supervisor and the sandbox, and their
containers into objects with few methods. It parses no flags, prints nothing, handles no signals and starts no process
of its own: whoever calls it holds the sandbox.
"""
