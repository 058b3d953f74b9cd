"""Files of lines `KEY: VALUE` or `KEY=VALUE`, such as /proc/meminfo and os-release. Light: `env` shows itself fast."""

from pathlib import Path

__all__ = ["first_cpu", "kib_of", "read_pairs"]


def read_pairs(path: str, separator: str, *, until_blank: bool = False) -> dict[str, str]:
    """Empty if it cannot be read. With `until_blank` only the first block of lines counts."""
    found: dict[str, str] = {}
    try:
        text = Path(path).read_text()
    except OSError:
        return found
    for line in text.splitlines():
        if until_blank and not line.strip():
            break
        key, split, value = line.partition(separator)
        if split:
            found[key.strip()] = value.strip()
    return found


def first_cpu() -> dict[str, str]:
    """What /proc/cpuinfo says of the first CPU."""
    return read_pairs("/proc/cpuinfo", ":", until_blank=True)


def kib_of(memory: dict[str, str], key: str) -> int:
    """A value of /proc/meminfo; 0 if it is not there."""
    words = memory.get(key, "0").split()
    return int(words[0]) if words and words[0].isdigit() else 0
