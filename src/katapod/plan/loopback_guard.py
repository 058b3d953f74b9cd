"""Rules that keep the host's loopback from what comes in by a bridge. Pure.

`route_localnet`, which CNI's `portmap` sets on a bridge for good, makes the kernel route packets for 127.0.0.0/8 that
came in by it (ip-sysctl.rst). RFC 1122, 3.2.1.3: such addresses never appear outside a host.
"""

from collections.abc import Iterable

__all__ = ["COMMENT", "guard_changes", "guard_rules"]

COMMENT = "katapod-loopback"
_CHAIN = "PREROUTING"  # of the table raw: before connection tracking, and so before what it translates back


def guard_rules(bridge: str) -> tuple[str, ...]:
    """As `iptables -S` writes them."""
    return tuple(
        f"-A {_CHAIN} {way} 127.0.0.0/8 -i {bridge} -m comment --comment {COMMENT} -j DROP" for way in ("-s", "-d")
    )


def guard_changes(shown: str, bridges: Iterable[str], devices: Iterable[str]) -> str:
    """Input for `iptables-restore --noflush` that gives each of `bridges` its rules once, and takes away those of
    ours whose device does not exist; empty if all is as it should be. `shown`: what `iptables -t raw -S` says."""
    ours = [" ".join(line.replace('"', "").split()) for line in shown.splitlines() if COMMENT in line]
    there = set(devices)
    wanted = [rule for bridge in dict.fromkeys(bridges) for rule in guard_rules(bridge)]
    stale = [rule for rule in ours if _device(rule) not in there]
    twice = [rule for number, rule in enumerate(ours) if rule in ours[:number] and rule not in stale]
    lines = [rule.replace("-A ", "-D ", 1) for rule in [*stale, *twice]]
    lines += [rule.replace(f"-A {_CHAIN} ", f"-I {_CHAIN} 1 ", 1) for rule in wanted if rule not in ours]
    return "".join(f"{line}\n" for line in ("*raw", *lines, "COMMIT")) if lines else ""


def _device(rule: str) -> str:
    words = rule.split()
    return words[words.index("-i") + 1] if "-i" in words[:-1] else ""
