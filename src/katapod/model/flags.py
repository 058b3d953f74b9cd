"""Values of command line flags, in the syntax that users of `docker run` know.

Each parser is pure and raises UsageError that names the flag, the value and an example of a right one.
"""

import posixpath
import re
import signal
from collections.abc import Iterable, Mapping
from typing import NoReturn

from msgspec import Struct

from katapod.model import oci
from katapod.model.errors import UsageError
from katapod.model.text import need_text

__all__ = [
    "ALL_CAPABILITIES",
    "UserName",
    "check_swap",
    "has_label",
    "is_number",
    "need_text",
    "parse_accelerator",
    "parse_cap",
    "parse_cpus",
    "parse_env",
    "parse_env_file",
    "parse_group",
    "parse_hostname",
    "parse_label",
    "parse_memory",
    "parse_pids_limit",
    "parse_signal",
    "parse_size",
    "parse_stop_timeout",
    "parse_sysctl",
    "parse_ulimit",
    "parse_user",
    "parse_workdir",
    "refuse",
]

MIN_MEMORY_BYTES = 6 << 20
"""Docker's minimum: below it crun and the command do not even start."""


def refuse(flag: str, value: str, cause: str, example: str) -> NoReturn:
    """Raises UsageError."""
    shown = value if len(value) <= 200 else value[:200] + "..."
    raise UsageError(f"cannot use {flag} {shown!r}: {cause}", hint=f"for example: {flag} {example}")


# --- sizes and numbers

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kmgtp]?)i?b?", re.IGNORECASE | re.ASCII)
_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50}


def parse_size(text: str, flag: str = "--shm-size") -> int:
    """Bytes of "512m", "1g", "1.5GiB", "65536" (bytes). Units are powers of 1024, as in Docker."""
    found = _SIZE.fullmatch(text.strip())
    if not found or len(text) > 40:
        refuse(flag, text, "it is not a size (a number and one of b, k, m, g)", "512m")
    number, unit = found.groups()
    size = int(float(number) * (1 << _UNITS[unit.lower()])) if "." in number else int(number) << _UNITS[unit.lower()]
    if size >= 1 << 63:
        refuse(flag, text, "it is more than 64 bits can hold", "512m")
    return size


def parse_memory(text: str, flag: str = "-m") -> int | None:
    """A memory limit in bytes; 0 means none, as in Docker."""
    size = parse_size(text, flag)
    if size == 0:
        return None
    if size < MIN_MEMORY_BYTES:
        refuse(flag, text, "the least that a container can start with is 6m", "64m")
    return size


def has_label(labels: Mapping[str, str], wanted: str) -> bool:
    """Of a filter by label. `wanted`: K, or K=V."""
    name, equals, value = wanted.partition("=")
    return name in labels and (not equals or labels[name] == value)


def check_swap(text: str, memory: int | None) -> None:
    """Of --memory-swap. A guest has no swap: the limit of both is the memory's. Raises UsageError for another."""
    if text in ("", "0", "-1"):
        return
    size = parse_size(text, "--memory-swap")
    if memory is None:
        raise UsageError("cannot use --memory-swap: it needs a memory limit", hint="for example: -m 512m")
    if size != memory:
        raise UsageError(
            f"cannot use --memory-swap {text}: a guest has no swap, so it can only be what -m is",
            hint=f"-m {max(size, memory) >> 20}m gives the container as much memory",
        )


def parse_cpus(text: str, flag: str = "--cpus") -> float | None:
    """A number of CPUs; 0 means no limit, as in Docker. The host's number is checked by sizing.py."""
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,9})?|\.[0-9]{1,9}", text):
        refuse(flag, text, "it is not a number of CPUs", "1.5")
    cpus = float(text)
    if cpus == 0:
        return None
    if cpus < 0.01:
        refuse(flag, text, "the kernel's least share is 0.01 of a CPU", "0.5")
    return cpus


def parse_pids_limit(text: str, flag: str = "--pids-limit") -> int | None:
    """A number of processes; 0 or -1 means no limit."""
    number = _integer(flag, text, "100", least=-1)
    return number if number > 0 else None


def parse_stop_timeout(text: str, flag: str = "--stop-timeout") -> int | None:
    """Seconds between the stop signal and SIGKILL; -1 (None) means to wait for ever."""
    number = _integer(flag, text, "10", least=-1)
    return number if number >= 0 else None


def _integer(flag: str, text: str, example: str, least: int) -> int:
    if not re.fullmatch(r"-?[0-9]{1,10}", text):
        refuse(flag, text, "it is not a whole number", example)
    if int(text) < least:
        refuse(flag, text, f"the least value is {least}", example)
    return int(text)


ACCELERATORS = ("auto", "kvm", "uml", "tcg")


def parse_accelerator(text: str, flag: str = "--accel") -> str:
    """The name of one, or empty for the configuration's."""
    if text and text not in ACCELERATORS:
        raise UsageError(f"cannot use {flag} {text[:200]!r}: it must be auto, kvm, uml or tcg")
    return text


def parse_signal(text: str, flag: str = "--signal") -> int:
    """Number of "KILL", "SIGKILL", "kill", "9", "RTMIN+3"."""
    name = text.upper().removeprefix("SIG")
    if re.fullmatch(r"[0-9]{1,2}", name) and 1 <= int(name) <= 64:
        return int(name)
    if found := re.fullmatch(r"RT(MIN|MAX)(?:([+-])([0-9]{1,2}))?", name):
        base = signal.SIGRTMIN if found[1] == "MIN" else signal.SIGRTMAX
        number = base + int((found[2] or "+") + (found[3] or "0"))
        if signal.SIGRTMIN <= number <= signal.SIGRTMAX:
            return int(number)
    elif f"SIG{name}" in signal.Signals.__members__:
        return int(signal.Signals[f"SIG{name}"])
    refuse(flag, text, "no such signal", "TERM")


# --- environment and labels


def parse_workdir(text: str, flag: str = "-w") -> str:
    if not text.startswith("/") or "\0" in text:
        refuse(flag, text, "the working directory must be an absolute path", "/srv")
    return "/" + posixpath.normpath(text).lstrip("/")


def parse_env(entries: Iterable[str], environ: Mapping[str, str], flag: str = "-e") -> tuple[str, ...]:
    """K=V as it is; K alone takes the caller's value and is left out if the caller has none."""
    found: dict[str, str] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not name or "\0" in entry:
            refuse(flag, entry, "it has no name before '='" if not name else "it has a NUL character", "K=V")
        if equals:
            found[name] = value
        elif name in environ:
            need_text(flag, f"{name}={environ[name]}")
            found[name] = environ[name]
    return tuple(f"{name}={value}" for name, value in found.items())


def parse_env_file(text: str, environ: Mapping[str, str], where: str) -> tuple[str, ...]:
    """The lines of an --env-file: K=V or K each; blank lines and lines that begin with # do not count.
    Quotes are not special, as in Docker."""
    entries = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        entry = line.lstrip()
        if not entry or entry.startswith("#"):
            continue
        name = entry.partition("=")[0]
        if not name or any(character.isspace() for character in name):
            refuse("--env-file", where, f"line {number}: {name!r} is not a name", "settings.env (lines K=V)")
        entries.append(entry)
    return parse_env(entries, environ, "--env-file")


def parse_label(text: str, flag: str = "--label") -> tuple[str, str]:
    """K=V or K, which has an empty value."""
    name, _, value = text.partition("=")
    if not name:
        refuse(flag, text, "it has no name before '='", "team=storage")
    return name, value


# --- identity and privileges


class UserName(Struct, frozen=True, kw_only=True):
    """What -u names: a user and perhaps a group, each a name or a number in decimal."""

    user: str
    group: str | None = None


_USER_WORD = re.compile(r"[^\s:/\x00-\x1f]{1,256}")


def is_number(word: str) -> bool:
    """Whether a user or group is given by its number. Digits of other scripts belong to names."""
    return word.isascii() and word.isdecimal()


def parse_user(text: str, flag: str = "-u") -> UserName:
    """USER[:GROUP]. An empty user is the one with number 0, an empty group the user's own, as in Docker."""
    user, _, group = text.partition(":")
    for word in (user, group):
        if word:
            _check_name_or_number(word, flag, text, "1000:1000")
    return UserName(user=user or "0", group=group or None)


def parse_group(text: str) -> str:
    """One GROUP of --group-add, by name or number."""
    _check_name_or_number(text, "--group-add", text, "video")
    return text


def _check_name_or_number(word: str, flag: str, value: str, example: str) -> None:
    if not _USER_WORD.fullmatch(word):
        refuse(flag, value, f"{word!r} is neither a name nor a number", example)
    if is_number(word) and int(word) >= 2**32 - 1:
        refuse(flag, value, f"{word} is not a user or group number", example)


ALL_CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
)
"""In the order of linux/capability.h."""


def parse_cap(text: str, flag: str = "--cap-add") -> str:
    """ "ALL", or CAP_NET_ADMIN of "NET_ADMIN", "cap_net_admin"."""
    name = text.upper()
    if name in ("ALL", "CAP_ALL"):
        return "ALL"
    name = name if name.startswith("CAP_") else f"CAP_{name}"
    if name not in ALL_CAPABILITIES:
        refuse(flag, text, "no such capability", "NET_ADMIN")
    return name


_RLIMITS = frozenset(
    {"as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue"}
    | {"nice", "nofile", "nproc", "rss", "rtprio", "rttime", "sigpending", "stack"}
)
UNLIMITED = 2**64 - 1


def parse_ulimit(text: str, flag: str = "--ulimit") -> oci.Rlimit:
    """NAME=SOFT[:HARD]; -1 or "unlimited" means no limit; HARD defaults to SOFT."""
    name, equals, values = text.partition("=")
    if name.lower() not in _RLIMITS:
        refuse(flag, text, f"there is no limit {name!r}", "nofile=1024:2048")
    soft_text, colon, hard_text = values.partition(":")
    soft = _limit(soft_text)
    hard = _limit(hard_text) if colon else soft
    if not equals or soft is None or hard is None:
        refuse(flag, text, "it is not NAME=SOFT[:HARD] with numbers", "nofile=1024:2048")
    if soft > hard:
        refuse(flag, text, "the soft limit exceeds the hard limit", "nofile=1024:2048")
    return oci.Rlimit(type=f"RLIMIT_{name.upper()}", soft=soft, hard=hard)


def _limit(text: str) -> int | None:
    if text in ("-1", "unlimited"):
        return UNLIMITED
    return int(text) if re.fullmatch(r"[0-9]{1,19}", text) else None


_SYSCTL_NAMES = frozenset(
    {"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax"}
    | {"kernel.shmmni", "kernel.shm_rmid_forced", "kernel.domainname"}
)
_SYSCTL_PREFIXES = ("net.", "fs.mqueue.")


def parse_sysctl(text: str, flag: str = "--sysctl") -> tuple[str, str]:
    """NAME=VALUE of a setting that belongs to a namespace."""
    name, equals, value = text.partition("=")
    name = name.strip().replace("/", ".")
    if not equals or not re.fullmatch(r"[a-zA-Z0-9_.-]{1,128}", name) or "\0" in value:
        refuse(flag, text, "it is not NAME=VALUE", "net.core.somaxconn=1024")
    if ".." in name or not (name in _SYSCTL_NAMES or name.startswith(_SYSCTL_PREFIXES)):
        refuse(flag, text, "it does not belong to a namespace of the container", "net.core.somaxconn=1024")
    return name, value.strip()


_HOST_LABEL = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?")
MAX_HOSTNAME = 64
"""Linux' __NEW_UTS_LEN; DNS would allow 253."""


def parse_hostname(text: str, flag: str = "--hostname") -> str:
    """Labels of at most 63 letters, digits, '-' and '_', joined by dots; at most 64 characters in all."""
    if len(text) > MAX_HOSTNAME:
        refuse(flag, text, f"it has {len(text)} characters, Linux takes at most {MAX_HOSTNAME}", "web-1")
    if not all(_HOST_LABEL.fullmatch(label) for label in text.split(".")):
        refuse(flag, text, "it is not a host name", "web-1")
    return text
