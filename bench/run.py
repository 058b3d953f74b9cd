"""`make bench`: the budgets of the design, measured in one run on one machine.

Rows are ratios to the raw boot that is timed beside them, round by round: QEMU q35, the same accelerator,
the same kernel as bzImage, an initrd whose init only powers off. Timings never decide a test.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

KATA = str(Path(sys.executable).with_name("kata-runtime"))
CACHE = Path("/var/cache/kata-containers")
IMAGE_BUDGET_MB = 19.7
NAME = "katapod-bench"


@dataclass(frozen=True, slots=True)
class Row:
    """`ratio` is value divided by the raw boot's median, where that makes sense."""

    name: str
    value: float
    unit: str
    ratio: float | None = None
    budget: float | None = None
    spread: float | None = None  # half of the distance between the quartiles

    @property
    def within(self) -> bool | None:
        measured = self.ratio if self.ratio is not None else self.value
        return None if self.budget is None else measured <= self.budget


def seconds(work: Callable[[], None]) -> float:
    before = time.monotonic()
    work()
    return time.monotonic() - before


def power_off_initrd(directory: Path) -> Path:
    """An initrd with busybox alone, whose init powers off."""
    root = directory / "root"
    (root / "bin").mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", root / "bin" / "busybox")
    init = root / "init"
    init.write_text("#!/bin/busybox sh\nexec /bin/busybox poweroff -f\n")
    init.chmod(0o755)
    archive = directory / "poweroff.cpio"
    names = b"".join(os.fsencode(path.relative_to(root)) + b"\0" for path in sorted(root.rglob("*")))
    with archive.open("wb") as handle:
        subprocess.run(["cpio", "-o", "-0", "-H", "newc", "--quiet"], cwd=root, input=names, stdout=handle, check=True)
    return archive


def raw_boot(kernel: Path, initrd: Path, accelerator: str) -> None:
    cpu = "host" if accelerator == "kvm" else "max"
    subprocess.run(
        [
            "qemu-system-x86_64",
            "-machine",
            f"q35,accel={accelerator}",
            "-cpu",
            cpu,
            "-m",
            "256M",
            "-nodefaults",
            "-no-user-config",
            "-nographic",
            "-serial",
            "stdio",
            "-no-reboot",
            "-kernel",
            str(kernel),
            "-initrd",
            str(initrd),
            "-append",
            "console=ttyS0 quiet panic=1",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=120,
    )


def until_output(*arguments: str) -> float:
    """Seconds until the command's first output; the rest of its life is not counted."""
    before = time.monotonic()
    with subprocess.Popen([KATA, *arguments], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        taken = time.monotonic() - before
        process.stdout.read()
    if not first or process.returncode != 0:
        raise SystemExit(f"kata-runtime {' '.join(arguments)} failed: status {process.returncode}")
    return taken


def pss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"process {pid} has no Pss")


def processes_named(word: str, mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if word in command.split(" ")[0] and mark in command:
                found.append(int(entry.name))
    return found


def measure_idle() -> list[Row]:
    """PSS of an idle sandbox with a 256 MiB VM, by part."""
    subprocess.run(
        [KATA, "run", "-d", "--rm", "--name", NAME, "-m", "64m", "busybox", "sleep", "600"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    try:
        time.sleep(3)
        listed = json.loads(subprocess.run([KATA, "list", "--json"], check=True, capture_output=True).stdout)
        record = next(row for row in listed if row["name"] == NAME)
        parts = {
            "QEMU": sum(map(pss_mib, processes_named("qemu-system", f"sandbox-{NAME},"))),
            "virtiofsd": sum(map(pss_mib, processes_named("virtiofsd", f"/{NAME}/shared"))),
            "Katapod": pss_mib(record["owner_pid"]),
        }
    finally:
        subprocess.run([KATA, "delete", "--force", NAME], check=True)
    rows = [Row(f"idle PSS, {part}", value, "MiB") for part, value in parts.items()]
    size = record["memory_mib"]
    return [*rows, Row(f"idle PSS, all ({size} MiB VM)", sum(parts.values()), "MiB", budget=160)]


def timed_rows(rounds: int, accelerator: str, directory: Path) -> list[Row]:
    version = os.uname().release
    manifest = json.loads((CACHE / "osbuilder-images" / "current" / "manifest.json").read_text())
    version = manifest.get("kernel_version", version)
    bzimage, initrd = Path(f"/boot/vmlinuz-{version}"), power_off_initrd(directory)
    direct = CACHE / "vmlinuz.container"
    run = ("run", "--rm", "--accel", accelerator, "-m", "64m", "busybox", "echo", "hello")
    subprocess.run(
        [KATA, "run", "-d", "--rm", "--accel", accelerator, "--name", NAME, "-m", "64m", "busybox", "sleep", "3600"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    exec_times = [until_output("exec", NAME, "echo", "hello") for _ in range(rounds)]
    subprocess.run([KATA, "delete", "--force", NAME], check=True)
    times: dict[str, list[float]] = {"raw": [], "pvh": [], "run": []}
    for number in range(rounds):
        print(f"  round {number + 1} of {rounds}", file=sys.stderr)
        times["raw"].append(seconds(lambda: raw_boot(bzimage, initrd, accelerator)))
        times["pvh"].append(seconds(lambda: raw_boot(direct, initrd, accelerator)))
        times["run"].append(until_output(*run))
    raw = statistics.median(times["raw"])

    def row(name: str, values: list[float], budget: float | None = None) -> Row:
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
        middle = statistics.median(values)
        return Row(name, middle, "s", middle / raw, budget, (high - low) / 2)

    return [
        row("raw boot, bzImage (baseline)", times["raw"]),
        row("raw boot, PVH", times["pvh"]),
        row("run until output, no template", times["run"], 1.6),
        row("exec until output", exec_times, 0.1),
    ]


def print_table(rows: list[Row]) -> None:
    width = max(len(row.name) for row in rows)
    print(f"{'what'.ljust(width)}  {'value':>14}  {'ratio':>6}  {'budget':>6}")
    for row in rows:
        spread = f" +-{row.spread:.2f}" if row.spread is not None else ""
        ratio = f"{row.ratio:.2f}" if row.ratio is not None else ""
        budget = f"{row.budget:g}" if row.budget is not None else ""
        verdict = {None: "", True: "within", False: "OVER"}[row.within]
        print(
            f"{row.name.ljust(width)}  {f'{row.value:.2f}{spread} {row.unit}':>14}  {ratio:>6}  {budget:>6}  {verdict}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--accel", choices=("tcg", "kvm"), default="tcg")
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="katapod-bench-") as scratch:
        rows = timed_rows(options.rounds, options.accel, Path(scratch))
    initrd_mb = os.stat(CACHE / "kata-containers-initrd.img").st_size / 1e6
    rows += [Row("guest initrd", initrd_mb, "MB", budget=IMAGE_BUDGET_MB), *measure_idle()]
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    print(f"{os.cpu_count()} CPUs, host {os.uname().release}, {qemu.splitlines()[0]}, {options.accel}")
    print_table(rows)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    fields = ("name", "value", "unit", "ratio", "budget")
    options.output.write_text(
        json.dumps([{field: getattr(row, field) for field in fields} for row in rows], indent=1) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
