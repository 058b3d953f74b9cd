"""The flags and actions of `containerd-shim-kata-v2`, parsed. Imports little: every pod waits for `start`."""

import os

__all__ = ["Arguments", "UsageError", "parse_arguments"]

TEXTS = ("namespace", "id", "address", "publish-binary", "bundle", "socket", "debug-socket")
SWITCHES = ("debug", "v", "version", "info", "h", "help")
ACTIONS = ("", "start", "delete", "features")


class UsageError(Exception):
    """The command line is wrong."""


class Arguments:
    """What containerd passed. `address` is its main socket; empty under CRI-O."""

    def __init__(self, texts: dict[str, str], switches: set[str], action: str) -> None:
        self.namespace = texts.get("namespace", "")
        self.id = texts.get("id", "")
        self.address = texts.get("address", "")
        self.bundle = texts.get("bundle", "") or os.getcwd()
        self.debug = "debug" in switches
        self.version = bool(switches & {"v", "version"})
        self.info = "info" in switches
        self.help = bool(switches & {"h", "help"})
        self.action = action
        self.asks_only = self.version or self.info or self.help or action == "features"


def parse_arguments(words: list[str]) -> Arguments:
    """Raises UsageError."""
    texts: dict[str, str] = {}
    switches: set[str] = set()
    action = ""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            if action:
                raise UsageError(f"more than one action: {action}, {word}")
            action = word
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if name in SWITCHES:
            if value not in ("", "true"):
                raise UsageError(f"-{name} takes no value")
            switches.add(name)
        elif name in TEXTS:
            if not equals:
                if not rest:
                    raise UsageError(f"-{name} needs a value")
                value = rest.pop(0)
            texts[name] = value
        else:
            raise UsageError(f"unknown flag {word}")
    if action not in ACTIONS:
        raise UsageError(f"unknown action {action!r}: use start, delete or features")
    found = Arguments(texts, switches, action)
    if not found.asks_only:
        for name in ("id", "namespace"):
            if not texts.get(name):
                raise UsageError(f"missing flag -{name}")
    return found
