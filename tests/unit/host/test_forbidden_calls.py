"""Which call a filter has ended a process for, out of the kernel's log."""

from pathlib import Path

from katapod.host.forbidden_calls import forbidden_call

RECORD = (
    "5,{n},2189654313,-;audit: type=1326 audit(1796065393.810:2): auid=4294967295 uid=0 gid=0 ses=4294967295 pid={pid} "
    'comm="{exe}" exe="{exe}" sig={sig} arch=c000003e syscall={call} compat=0 ip=0x7fda8871d4f7 code=0x80000000\n'
)
QEMU = "/usr/bin/qemu-system-x86_64"


def log_of(path: Path, *records: tuple[int, str, int, int]) -> Path:
    lines = [
        RECORD.format(n=n, pid=pid, exe=exe, sig=sig, call=call) for n, (pid, exe, sig, call) in enumerate(records)
    ]
    path.write_text("6,298,213266,-;xt_time: kernel timezone is -0000\n" + "".join(lines))
    return path


def test_that_of_the_process_counts(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log", (7, QEMU, 31, 57), (8, QEMU, 31, 59))
    assert forbidden_call(7, QEMU, log) == 57
    assert forbidden_call(8, QEMU, log) == 59


def test_else_the_last_of_the_program(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log", (7, QEMU, 31, 57), (8, QEMU, 31, 59), (9, "/bin/other", 31, 60), (10, QEMU, 0, 61))
    assert forbidden_call(1000, QEMU, log) == 59


def test_a_log_that_tells_nothing(tmp_path: Path) -> None:
    assert forbidden_call(7, QEMU, log_of(tmp_path / "log", (9, "/bin/other", 31, 60))) is None
    assert forbidden_call(7, QEMU, tmp_path / "none") is None
