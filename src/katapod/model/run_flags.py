"""Values of the flags of `run` that are about neither the container's spec nor its mounts or networks, in the syntax
that users of `docker run` know. Pure."""

import os
import re

from msgspec import Struct

from katapod.model.errors import UsageError
from katapod.model.flags import parse_size, refuse
from katapod.model.image import Platform, parse_platform

__all__ = [
    "LOG_BYTES",
    "STREAMS",
    "LogChoice",
    "RestartPolicy",
    "check_platform",
    "parse_attach",
    "parse_cpu_list",
    "parse_cpu_quota",
    "parse_log",
    "parse_oom_score_adj",
    "parse_pull",
    "parse_restart",
    "parse_truth",
    "parse_umask",
]

LOG_BYTES = 64 << 20
"""What is kept of a container's output."""


class LogChoice(Struct, frozen=True):
    """`keep`: whether there is a log at all. `size_bytes`: the newest that is kept."""

    keep: bool = True
    size_bytes: int = LOG_BYTES


class RestartPolicy(Struct, frozen=True):
    """`name`: no, always, unless-stopped or on-failure. `tries`: how often on-failure does it at most; 0: no limit."""

    name: str = "no"
    tries: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.tries}" if self.tries else self.name

    def wants(self, exit_code: int, restarts: int) -> bool:
        """Whether a container is started again that has ended so, unasked, after so many times. Docker's rule."""
        if self.name == "on-failure":
            return exit_code != 0 and (not self.tries or restarts < self.tries)
        return self.name != "no"


_RESTARTS = ("no", "always", "unless-stopped", "on-failure")


def parse_restart(text: str, flag: str = "--restart") -> RestartPolicy:
    """no, always, unless-stopped or on-failure[:N]."""
    name, colon, tries = text.partition(":")
    if name not in _RESTARTS or (colon and name != "on-failure"):
        refuse(flag, text, f"it is none of {', '.join(_RESTARTS)}[:N]", "on-failure:5")
    if colon and not re.fullmatch(r"[0-9]{1,9}", tries):
        refuse(flag, text, "the number of tries is not a number", "on-failure:5")
    return RestartPolicy(name, int(tries or 0))


PULLS = ("missing", "always", "never", "newer")


def parse_pull(text: str, flag: str = "--pull") -> str:
    """When a registry is asked. `newer`, Podman's, is `always`: what has not changed is not copied again."""
    if text not in PULLS:
        refuse(flag, text, f"it is none of {', '.join(PULLS)}", "missing")
    return "always" if text == "newer" else text


def check_platform(text: str, flag: str = "--platform", machine: str = "") -> None:
    """OS[/ARCHITECTURE[/VARIANT]] has to be this machine's, which the VM's is. Raises UsageError."""
    here = parse_platform(machine or os.uname().machine)
    system, _, rest = text.lower().partition("/")
    architecture, _, variant = rest.partition("/")
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(architecture, architecture)
    if not system or not here.runs(Platform(system, architecture, variant)):
        shown = f"{here.os}/{here.architecture}"
        refuse(flag, text, f"a VM has this machine's processor, so only {shown} can run", shown)


STREAMS = ("stdin", "stdout", "stderr")


def parse_attach(texts: tuple[str, ...], flag: str = "-a") -> tuple[str, ...]:
    """The streams that are attached: all without a word."""
    for text in texts:
        if text.lower() not in STREAMS:
            refuse(flag, text, f"it is none of {', '.join(STREAMS)}", "stdout")
    return tuple(name for name in STREAMS if name in {text.lower() for text in texts}) if texts else STREAMS


_CPU_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")


def parse_cpu_list(text: str, flag: str = "--cpuset-cpus") -> frozenset[int]:
    """Numbers of CPUs of the host: 0-2,5."""
    found = set[int]()
    for part in text.split(","):
        numbers = _CPU_RANGE.fullmatch(part.strip())
        if not numbers:
            refuse(flag, text, f"{part!r} is neither a number nor a range", "0-1,3")
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if last < first:
            refuse(flag, text, f"the range {part} is empty", "0-1,3")
        found.update(range(first, last + 1))
    return frozenset(found)


PERIOD_MIN, PERIOD_MAX, QUOTA_MIN = 1000, 1_000_000, 1000
"""Microseconds: the kernel's limits (kernel/sched/core.c, min_cfs_quota_period, max_cfs_quota_period)."""


def parse_cpu_quota(quota: str, period: str, default_period_us: int) -> tuple[float | None, int]:
    """(CPUs, period in microseconds) of --cpu-quota and --cpu-period; no CPUs: no limit."""
    period_us = default_period_us
    if period not in ("", "0"):
        if not re.fullmatch(r"[0-9]{1,9}", period) or not PERIOD_MIN <= int(period) <= PERIOD_MAX:
            refuse("--cpu-period", period, f"it is not within {PERIOD_MIN} and {PERIOD_MAX} microseconds", "100000")
        period_us = int(period)
    if quota in ("", "0", "-1"):
        return None, period_us
    if not re.fullmatch(r"[0-9]{1,12}", quota) or int(quota) < QUOTA_MIN:
        refuse("--cpu-quota", quota, f"it is no number of microseconds from {QUOTA_MIN} on", "50000")
    return int(quota) / period_us, period_us


def parse_umask(text: str, flag: str = "--umask") -> int:
    if not re.fullmatch(r"0?[0-7]{1,4}", text) or int(text, 8) > 0o777:
        refuse(flag, text, "it is not an octal number up to 0777", "0027")
    return int(text, 8)


def parse_oom_score_adj(text: str, flag: str = "--oom-score-adj") -> int:
    if not re.fullmatch(r"-?[0-9]{1,4}", text) or not -1000 <= int(text) <= 1000:
        refuse(flag, text, "it is not a number within -1000 and 1000", "500")
    return int(text)


OWN_LOGS = ("json-file", "local", "k8s-file")
"""Drivers whose users want a log that is kept and rotated here: ours is one, in the CRI's format."""
MAX_FILES = 2
"""Of which the log consists: host/logs.py."""


def parse_log(driver: str, options: tuple[str, ...]) -> LogChoice:
    """--log-driver and --log-opt."""
    if driver == "none":
        return LogChoice(keep=False)
    if driver and driver not in OWN_LOGS:
        raise UsageError(
            f"cannot use --log-driver {driver!r}: a container's log is a file of Katapod's",
            hint=f"for example: kata-runtime run NAME ... | systemd-cat -t NAME, or --log-driver {OWN_LOGS[0]}",
        )
    size_bytes = LOG_BYTES
    for option in options:
        key, _, value = option.partition("=")
        if key == "max-size":
            size_bytes = size_bytes if value == "-1" else parse_size(value, "--log-opt max-size")
        elif key == "max-file" and re.fullmatch(r"[0-9]{1,4}", value):
            if int(value) not in range(1, MAX_FILES + 1):
                refuse("--log-opt", option, f"a log has {MAX_FILES} files", "max-size=10m")
        elif key not in ("compress", "mode") or value not in ("false", "blocking"):
            refuse("--log-opt", option, "known are max-size and max-file", "max-size=10m")
    return LogChoice(size_bytes=size_bytes)


TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})
FALSE = frozenset({"0", "f", "F", "false", "FALSE", "False"})
"""Source: Go's strconv.ParseBool, by which Docker and Podman read the values of switches."""


def parse_truth(flag: str, text: str) -> bool:
    if text not in TRUE | FALSE:
        raise UsageError(f"cannot use {flag}={text[:100]}: it is neither true nor false")
    return text in TRUE
