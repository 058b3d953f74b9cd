"""kata-monitor as a program: where it listens, what it refuses, how it ends."""

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from katapod.monitor.token import TOKEN_FILE

MONITOR = str(Path(sys.executable).with_name("kata-monitor"))


def start() -> tuple["subprocess.Popen[str]", str]:
    """The program, and its address."""
    process = subprocess.Popen([MONITOR, "-listen-address", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[-1]


def run(*words: str, user: int | None = None) -> tuple[int, str, str]:
    done = subprocess.run([MONITOR, *words], capture_output=True, text=True, timeout=180, check=False, user=user)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_from_start_to_end(number: int, status: int) -> None:
    process, base = start()
    with process:
        with urllib.request.urlopen(f"{base}metrics", timeout=180) as answer:
            assert "kata_monitor_running_shim_count" in answer.read().decode()
        taken = run("-listen-address", base.removeprefix("http://").rstrip("/"))
        assert taken[0] == 1
        assert "Address already in use\n  hint:" in taken[2]
        process.send_signal(number)
        assert process.wait(180) == status


def test_the_link_shows_what_is_for_root() -> None:
    process, base = start()
    with process:
        code, link, said = run("-listen-address", base.removeprefix("http://").rstrip("/"), "--link")
        assert (code, said) == (0, "")
        assert link.startswith(f"{base}#token=")
        token = link.strip().partition("=")[2]
        assert TOKEN_FILE.read_text().strip() == token
        assert TOKEN_FILE.stat().st_mode & 0o777 == 0o600
        for header, whole in (("", b'"whole":false'), (f"Bearer {token}", b'"whole":true')):
            request = urllib.request.Request(f"{base}api/sandboxes", headers={"Authorization": header})
            with urllib.request.urlopen(request, timeout=180) as answer:
                assert whole in answer.read()
        process.terminate()
        assert process.wait(180) == 0


def test_what_it_says_of_itself() -> None:
    assert run("--version")[1].startswith("kata-monitor\n Version:\t")
    assert "-listen-address" in run("--help")[1]
    assert run("-bogus") == (2, "", "kata-monitor: unknown flag -bogus\n  hint: kata-monitor --help\n")
    code, _, said = run("-listen-address", "no.such.host.invalid:1")
    assert (code, "cannot listen on no.such.host.invalid:1" in said) == (1, True)


def test_without_root(tmp_path: Path) -> None:
    """The program itself may lie where others cannot read: then this shows nothing."""
    nobody = 65534
    if subprocess.run([MONITOR, "--version"], user=nobody, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"nobody cannot run {MONITOR}")
    code, _, said = run(user=nobody)
    assert (code, "only root may" in said) == (1, True)
    assert os.geteuid() == 0
