"""plan: pure descriptions of what will be done. Building one opens nothing, starts nothing, reads no clock.

Facts about the machine are collected by `katapod.host` first and passed in; `host` also carries plans out.
Every plan has `describe()`: the debug log, the dry run and the tests' golden text at once.
"""
