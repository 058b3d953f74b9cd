"""The command line of kata-monitor: upstream's flags, with one dash or two."""

import ipaddress

from msgspec import Struct

__all__ = ["LEVELS", "Address", "Options", "UsageError", "parse_address", "parse_options"]

USAGE = """\
usage: kata-monitor [-listen-address HOST:PORT] [-log-level LEVEL] [-runtime-endpoint SOCKET]
       kata-monitor [-listen-address HOST:PORT] --link
       kata-monitor --version

Serve the metrics of all sandboxes of this host for Prometheus, and a web page that shows them, until Ctrl-C.

  -listen-address HOST:PORT  where to listen (default 127.0.0.1:8090; :8090 is every address of the host, and then
                             anyone who reaches it can read)
  -log-level LEVEL           trace, debug, info, warn, error, fatal or panic (default info)
  -runtime-endpoint SOCKET   accepted for compatibility and ignored; sandboxes know the names of their pods
  --link                     print the page's address with the token that shows commands, errors and consoles, and
                             exit; without it the page shows figures, as /metrics does
  --version, version         print the version
  -h, --help                 print this

First steps: kata-monitor, then open what kata-monitor --link prints, or: curl http://127.0.0.1:8090/metrics
"""
LEVELS = ("trace", "debug", "info", "warn", "error", "fatal", "panic")
DEFAULT_ADDRESS = "127.0.0.1:8090"


class UsageError(Exception):
    """The command line is wrong."""


class Address(Struct, frozen=True):
    host: str  # an IP address or a name; empty: every address
    port: int

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Options(Struct, frozen=True):
    address: Address
    log_level: str = "info"
    runtime_endpoint: str = ""
    link: bool = False
    version: bool = False
    help: bool = False


def parse_address(text: str) -> Address:
    """HOST:PORT, [IPV6]:PORT or :PORT. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise UsageError(f"cannot listen on {text!r}: use HOST:PORT, for example {DEFAULT_ADDRESS}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise UsageError(f"cannot listen on {text!r}: put an IPv6 address in brackets, for example [::1]:8090")
    return Address(host, int(port))


def parse_options(words: list[str]) -> Options:
    """Raises UsageError."""
    found = {"listen-address": DEFAULT_ADDRESS, "log-level": "info", "runtime-endpoint": ""}
    if words == ["version"]:
        return Options(parse_address(DEFAULT_ADDRESS), version=True)
    rest = list(words)
    version = wants_help = link = False
    while rest:
        word = rest.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-") or word.strip("-") == "":
            raise UsageError(f"unknown command {word!r}: kata-monitor takes flags only")
        if name in ("h", "help"):
            wants_help = True
        elif name in ("version", "v"):
            version = True
        elif name == "link":
            link = True
        elif name not in found:
            raise UsageError(f"unknown flag {word}")
        else:
            if not equals:
                if not rest:
                    raise UsageError(f"{word} needs a value")
                value = rest.pop(0)
            found[name] = value
    if found["log-level"] not in LEVELS:
        raise UsageError(f"unknown log level {found['log-level']!r}: use {', '.join(LEVELS)}")
    address = parse_address(found["listen-address"])
    return Options(address, found["log-level"], found["runtime-endpoint"], link, version, wants_help)
