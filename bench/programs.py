"""Real programs, each between two lines of output, and what many sandboxes get done at once: scripts and rows. Pure.

The programs are those by which User-mode Linux was chosen (docs/adr/0041-a-ladder-of-vmms.md). Those of Python are run
once before, so that the files are in memory.
"""

from collections.abc import Iterator

from bench.measure import Outcome
from bench.rows import Metric

__all__ = ["BUSY_COUNTS", "BUSY_S", "PROGRAMS_SCRIPT", "WORK", "busy_script", "program_readings", "programs"]

_IMPORTS = "import asyncio, ssl, json, http.client, sqlite3, decimal, multiprocessing"
_LOOP = "n = 0\nfor i in range(3000000): n += i"
_THREADS = """
import threading
def work():
    for _ in range(20000): pass
threads = [threading.Thread(target=work) for _ in range(50)]
[one.start() for one in threads]
[one.join() for one in threads]
"""
_CHILDREN = "import subprocess\nfor _ in range(50): subprocess.run(['/bin/true'], check=True)"
_FILES = """
import os
os.mkdir('{folder}')
for i in range(2000): open(f'{folder}/{{i}}', 'w').close()
for i in range(2000): os.remove(f'{folder}/{{i}}')
os.rmdir('{folder}')
"""
_SORT = "seq 1000000 | sort -R --random-source=/usr/bin/python3 >/tmp/numbers; sort -n /tmp/numbers >/dev/null"


def _python(program: str) -> str:
    return f'python3 -c "{program}"'


# name -> command, and how many times the host's time it may take: 1.2 times what User-mode Linux took by hand there
_PROGRAMS: dict[str, tuple[str, float | None]] = {
    "python3, nothing": (_python("pass"), 19.0),
    "python3, imports": (_python(_IMPORTS), 7.8),
    "python3, 3 million steps": (_python(_LOOP), 1.1),
    "python3, 50 threads": (_python(_THREADS), 5.0),
    "python3, 50 children": (_python(_CHILDREN), 11.3),
    "2,000 files in a tmpfs": (_python(_FILES.format(folder="/dev/files")), 4.6),
    "2,000 files on the root": (_python(_FILES.format(folder="/files")), None),
    "sort of a million numbers": (_SORT, 1.3),
    "sha256 of 64 MB": ("head -c 64000000 /dev/zero | sha256sum >/dev/null", None),
    "tar and gzip": ("tar cf - /usr/lib/python3*/json /usr/lib/python3*/asyncio | gzip >/dev/null", 4.6),
    "200 fork and exec": ("i=0; while [ $i -lt 200 ]; do /bin/true; i=$((i+1)); done", None),
    "600,000 system calls": ("dd if=/dev/zero of=/dev/null bs=1 count=300000 2>/dev/null", None),
}
PROGRAMS_SCRIPT = "set -e\n" + _python(_IMPORTS) + "\necho begin\n"
PROGRAMS_SCRIPT += "".join(f"{command}\necho '{name}'\n" for name, (command, _) in _PROGRAMS.items())


def programs(base: str, who: tuple[str, ...]) -> dict[str, Metric]:
    """A metric for each program, as a ratio to the contestant `base`, with the budgets of `who`."""
    return {
        name: Metric(name, "s", base=("", base), budgets=dict.fromkeys(who, budget) if budget else {})
        for name, (_, budget) in _PROGRAMS.items()
    }


def program_readings(outcome: Outcome) -> Iterator[tuple[str, float]]:
    """Name of the program and seconds. Raises BenchError if it did not come to its end."""
    before = outcome.until("begin")
    for name in _PROGRAMS:
        after = outcome.until(name)
        yield name, after - before
        before = after


BUSY_COUNTS = (1, 4, 10)
BUSY_S = 20
WORK = {
    count: Metric(f"{count} busy at once, work done", "per min", base=("", "runsc"), better="more")
    for count in BUSY_COUNTS
}


def busy_script() -> str:
    """Computes, starts programs and makes files for BUSY_S seconds, and writes how often it could."""
    return f"""
end=$(($(date +%s) + {BUSY_S})); n=0
while [ $(date +%s) -lt $end ]; do
  seq 20000 | sort -r | sha256sum >/tmp/sum
  i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done
  n=$((n+1))
done
echo $n
"""
