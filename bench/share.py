"""What is done on a share, the rows of it, and how they come from the lines that were written: pure.

The same script runs in every guest, by hand or in a container, so that only the way to the directory differs. What
is shared is in the host's memory: a disk varies more from one second to the next than virtio-fs costs. dd and rm are
busybox's, which its shell runs without starting a program: programs lie in memory by hand, and on virtio-fs in a
container of containerd's.
"""

from collections.abc import Iterator

from bench.by_hand import SHARE
from bench.containerd import CTR_EMULATED, CTR_RUNC
from bench.measure import Outcome
from bench.rows import Metric

__all__ = [
    "BY_HAND",
    "CTR_ROOT",
    "CTR_RUNC_SHARED",
    "CTR_SHARED",
    "CTR_SHARED_EMULATED",
    "SHARED",
    "SHARE_METRICS",
    "SHARE_SCRIPT",
    "share_readings",
]

BY_HAND, SHARED = "QEMU by hand", "Katapod share"
CTR_SHARED, CTR_ROOT, CTR_RUNC_SHARED = "ctr, Katapod share", "ctr, Katapod root", f"{CTR_RUNC} share"
CTR_SHARED_EMULATED = f"{CTR_EMULATED} share"
SHARE_MB = 128
SMALL_FILES = 500
LEAST = 0.95

# The same on the container's root (CTR_ROOT) has other files below it, an overlay on a disk, where by hand there are
# those of the share: only what the host reads from its memory can be compared.
WRITE, READ = (
    Metric(title, "MB/s", base=("", BY_HAND), better="more", budgets=dict.fromkeys(who, LEAST))
    for title, who in (
        (f"{SHARE_MB} MB written, then fsync", (SHARED, CTR_SHARED, CTR_SHARED_EMULATED)),
        (f"{SHARE_MB} MB read, not from the guest's cache", (SHARED, CTR_SHARED, CTR_ROOT, CTR_SHARED_EMULATED)),
    )
)
CREATE, OPEN, REMOVE = (
    Metric(
        f"{SMALL_FILES:,} small files {verb}",
        "files/s",
        base=("", BY_HAND),
        better="more",
        budgets=dict.fromkeys((SHARED, CTR_SHARED, CTR_SHARED_EMULATED), LEAST),
    )
    for verb in ("made and written", "opened and read", "removed")
)
SHARE_METRICS = (WRITE, READ, CREATE, OPEN, REMOVE)

# In the loops all is the shell's own: to start a process costs more than a file. What the guest knows of a file holds
# for a second (cache=auto): without the pauses, who is a little slower asks the daemon twice as often.
_EACH = f"i=0; while [ $i -lt {SMALL_FILES} ]; do"
SHARE_SCRIPT = f"""
set -e
mkdir -p {SHARE}/small
dd if=/dev/zero of={SHARE}/warm bs=1M count=1 conv=fsync 2>/dev/null
dd if={SHARE}/warm of=/dev/null bs=1M iflag=direct 2>/dev/null
rm {SHARE}/warm
echo begin
dd if=/dev/zero of={SHARE}/data bs=1000000 count={SHARE_MB} conv=fsync 2>/dev/null
echo written
dd if={SHARE}/data of=/dev/null bs=1M iflag=direct 2>/dev/null
echo read
rm {SHARE}/data
cd {SHARE}/small
echo small
{_EACH} echo $i > $i; i=$((i+1)); done
echo made
sleep 2
echo again
{_EACH} read -r line < $i; i=$((i+1)); done
echo opened
cd /
sleep 2
echo remove
rm -r {SHARE}/small
echo removed
"""
_PHASES = (
    (WRITE, SHARE_MB, "begin", "written"),
    (READ, SHARE_MB, "written", "read"),
    (CREATE, SMALL_FILES, "small", "made"),
    (OPEN, SMALL_FILES, "again", "opened"),
    (REMOVE, SMALL_FILES, "remove", "removed"),
)


def share_readings(outcome: Outcome) -> Iterator[tuple[Metric, float]]:
    """The rate of each phase of the script. Raises BenchError."""
    for metric, amount, begin, end in _PHASES:
        yield metric, amount / (outcome.until(end) - outcome.until(begin))
