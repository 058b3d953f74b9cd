"""The process that holds a sandbox of `run`: attached or in the background, started for it or kept ready by the pool.

It is the parent of VMM and virtiofsd, and ends with its container. Of the command line it gets typed values
(RunContext, RunRequest); it parses no flags. Entry points enter. Nothing is imported here: a client of the pool loads
its part of this room before all else.
"""
