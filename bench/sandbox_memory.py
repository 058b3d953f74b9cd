"""Host memory of idle sandboxes by part, for several numbers of them, and the marginal cost of one more.

    python -m bench.sandbox_memory [--counts 1,10,40] [--json]

PSS counts pages that processes share in proportion, so sums over sandboxes are what they take together; the pages of
a clone's guest memory that nobody has mapped yet are in no PSS and shown apart. MemAvailable has all of it, and all
that the rest of the machine does meanwhile.
"""

import argparse
import contextlib
import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from katapod.host.state import StateStore
from katapod.model.layout import Layout
from katapod.model.overhead import MemoryParts
from katapod.observe.overhead import memory_of

__all__ = ["MemoryRow", "measure_memory"]

KATA = str(Path(sys.executable).with_name("kata-runtime"))
COMMAND = ("-d", "--rm", "-m", "64m", "busybox", "sleep", "10000")
SETTLE_S = 5.0  # the guest gives free pages back after two seconds
STARTS_AT_ONCE = 2
WAYS = {"clone": "", "cold": "[factory]\nenable_template = false\n"}


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """`count` idle sandboxes. Sizes in MiB: means of one sandbox, but for the two marginal costs."""

    way: str  # "clone" or "cold"
    count: int
    parts: dict[str, float]
    pss: float
    total: float  # PSS and the guest memory that nobody maps
    marginal_total: float  # of one more sandbox since the row before, by the sums of `total`
    marginal_available: float  # the same by MemAvailable


def available_mib() -> float:
    """MemAvailable of this machine."""
    text = Path("/proc/meminfo").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("MemAvailable:")) / 1024


def measure_memory(way: str, counts: Sequence[int]) -> list[MemoryRow]:
    """Start up to max(counts) sandboxes and measure at each count; all are removed at the end.

    Raises CalledProcessError if one does not start.
    """
    store = StateStore(Layout())
    rows: list[MemoryRow] = []
    with _configuration(WAYS[way]) as options:
        _kata(*options, "run", "--rm", "-m", "64m", "busybox", "true")  # the template, and what is read from disk
        names: list[str] = []
        before_available, before_total, before_count = available_mib(), 0.0, 0
        try:
            for count in sorted(counts):
                fresh = [f"mem-{secrets.token_hex(4)}" for _ in range(count - len(names))]
                names += fresh
                with ThreadPoolExecutor(STARTS_AT_ONCE) as pool:
                    list(pool.map(lambda name: _kata(*options, "run", "--name", name, *COMMAND), fresh))
                time.sleep(SETTLE_S)
                found = [memory_of(store.read(name)) for name in names]
                total, available = _mib(sum(each.total_kib for each in found)), available_mib()
                rows.append(
                    MemoryRow(
                        way=way,
                        count=count,
                        parts=_mean_parts(found),
                        pss=_mib(sum(each.pss_kib for each in found)) / count,
                        total=total / count,
                        marginal_total=(total - before_total) / (count - before_count),
                        marginal_available=(before_available - available) / (count - before_count),
                    )
                )
                before_available, before_total, before_count = available, total, count
        finally:
            for name in names:
                subprocess.run([KATA, "delete", "--force", name], check=False, capture_output=True)
    return rows


def _mib(kib: float) -> float:
    return kib / 1024


def _mean_parts(found: Sequence[MemoryParts]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for each in found:
        for part, kib in each.rows():
            sums[part] = sums.get(part, 0.0) + _mib(kib)
    return {part: value / len(found) for part, value in sums.items()}


@contextlib.contextmanager
def _configuration(text: str) -> Iterator[tuple[str, ...]]:
    """Options that name a configuration file with `text`; none for no text."""
    if not text:
        yield ()
        return
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as handle:
        handle.write(text)
        handle.flush()
        yield ("--config", handle.name)


def _kata(*arguments: str) -> None:
    subprocess.run([KATA, *arguments], check=True, capture_output=True, text=True)


def show(rows: Sequence[MemoryRow]) -> None:
    """Print the rows as columns, in MiB."""
    lines = [("MiB a sandbox", [f"{row.way} {row.count}" for row in rows])]
    lines += [(part, [f"{row.parts[part]:.1f}" for row in rows]) for part in rows[0].parts]
    lines.append(("PSS", [f"{row.pss:.1f}" for row in rows]))
    lines.append(("together", [f"{row.total:.1f}" for row in rows]))
    lines.append(("one more, by the sums", [f"{row.marginal_total:.1f}" for row in rows]))
    lines.append(("one more, by MemAvailable", [f"{row.marginal_available:.1f}" for row in rows]))
    for title, cells in lines:
        print(f"{title:28}" + "".join(f"{cell:>10}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description="Host memory of idle sandboxes, by part.")
    parser.add_argument("--counts", default="1,10,40", help="numbers of sandboxes, separated by commas")
    parser.add_argument("--ways", default="clone,cold", help="clone, cold or both")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.counts.split(",")]
    rows = [row for way in arguments.ways.split(",") for row in measure_memory(way, counts)]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        show(rows)


if __name__ == "__main__":
    main()
