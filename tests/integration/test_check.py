"""`kata-runtime check` and kata-collect-data.sh on this machine, with things and without."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.kata import AS_OTHER_USER, KATA, Kata, Result

SCRIPT = Path(__file__).parents[2] / "packaging/kata-collect-data.sh"
LIMIT_S = 900.0  # only against hanging


@pytest.fixture
def kata() -> Kata:
    return Kata("check")


class Place:
    """A mount namespace with a /run/netns of its own, and a directory for temporary files: where only the test's
    commands can have left something."""

    def __init__(self, holder: int, temporary: Path) -> None:
        self._holder = Path(f"/proc/{holder}")
        self._temporary = temporary
        self._mounts = self._mounted()

    def command(self, *arguments: str) -> list[str]:
        """`kata-runtime ARGUMENTS` in there, as the process that is started."""
        return ["nsenter", f"--mount={self._holder}/ns/mnt", "--", "env", f"TMPDIR={self._temporary}", KATA, *arguments]

    def run(self, *arguments: str) -> Result:
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=LIMIT_S, check=False)
        return Result(done.returncode, done.stdout, done.stderr)

    def left(self) -> list[str]:
        """Network namespaces, mounts and temporary files that are still there."""
        files = [*(self._holder / "root/run/netns").iterdir(), *self._temporary.iterdir()]
        return [*map(str, files), *(self._mounted() - self._mounts)]

    def _mounted(self) -> set[str]:
        return set(self._holder.joinpath("mountinfo").read_text().splitlines())


@pytest.fixture
def place() -> Iterator[Place]:
    script = "mkdir -p /run/netns && mount -t tmpfs tmpfs /run/netns && echo ready && cat"
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    with (
        tempfile.TemporaryDirectory(prefix="kc") as temporary,  # a short path: there are sockets below it
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder,
    ):
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        yield Place(holder.pid, Path(temporary))
        holder.stdin.close()


def lines_of(result: Result) -> dict[str, dict[str, Any]]:
    return {line["line_id"]: line for line in json.loads(result.stdout)["lines"]}


def with_configuration(kata: Kata, tmp_path: Path, text: str, *arguments: str) -> Result:
    file = tmp_path / "configuration.toml"
    file.write_text(text)
    return kata("--config", str(file), "check", *arguments)


@pytest.mark.qemu("QEMU's guest image")
def test_this_machine_is_capable_and_nothing_is_left(place: Place, guest_image: dict[str, Any]) -> None:
    result = place.run("check")
    assert result.code == 0, result
    assert result.stdout.endswith(
        "System is capable of running Kata Containers\nSystem can currently create Kata Containers\n"
    )
    verdicts = lines_of(place.run("kata-check", "--json", "-n"))
    works = ("net.tap", "net.ingress", "net.redirect", "overlay", "jail", "image", "image.boots", "program.qemu")
    for line_id in works:
        assert verdicts[line_id]["outcome"] == "ok", verdicts[line_id]
    assert guest_image["kernel_version"] in verdicts["image"]["found"]
    assert place.left() == []


def command_line(pid: str) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


@pytest.mark.qemu("a boot of QEMU's")
def test_boot_and_ctrl_c(place: Place, guest_image: dict[str, Any], tmp_path: Path) -> None:
    """By emulation: proofs of the other rungs are tests/e2e/test_kvm_proof.py's."""
    (tmp_path / "configuration.toml").write_text('[katapod]\naccelerator = "tcg"\n')
    with (tmp_path / "configuration.toml").open() as config:
        words = ("--config", f"/proc/self/fd/{config.fileno()}", "check", "--boot")
        fds = (config.fileno(),)
        done = subprocess.run(
            place.command(*words, "--json"), capture_output=True, text=True, timeout=LIMIT_S, check=False, pass_fds=fds
        )
    boots = lines_of(Result(done.returncode, done.stdout, done.stderr))["image.boots"]
    assert boots["outcome"] == "ok", boots
    assert " s under " in boots["found"]
    assert place.left() == []

    process = subprocess.Popen(
        place.command("check", "--boot"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 180
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not any("qemu" in command_line(pid) for pid in children.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started = children.read_text().split()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=180)
    assert (process.returncode, stdout) == (130, "")
    assert "interrupted" in stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)
    assert place.left() == []


def test_without_this_and_that(kata: Kata, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = tmp_path / "nothing"
    link = tmp_path / "initrd"
    link.symlink_to(nothing)
    text = f'[hypervisor.qemu]\npath = "{nothing}"\ninitrd = "{link}"\nvirtio_fs_daemon = "{nothing}"\n'
    result = with_configuration(kata, tmp_path, text)
    assert result.code == 1
    assert result.stderr == "ERROR: System is not capable of running Kata Containers\n"
    verdicts = lines_of(with_configuration(kata, tmp_path, text, "--json"))
    for line_id in ("program.qemu", "program.virtiofsd", "image.initrd"):
        assert verdicts[line_id]["outcome"] == "missing", verdicts[line_id]
    assert "a link to" in verdicts["image.initrd"]["found"]
    broken = with_configuration(kata, tmp_path, "[hypervisor.qemu]\nno_such_key = 1\n", "--json")
    assert broken.code == 1
    assert "no_such_key" in lines_of(broken)["configuration"]["found"]
    monkeypatch.setenv("PATH", str(tmp_path))
    verdicts = lines_of(kata("check", "--json"))
    for name in ("ip", "tc", "skopeo", "umoci", "crun", "dracut"):
        assert verdicts[f"program.{name}"]["outcome"] == "less", name
    assert verdicts["net.redirect"]["outcome"] == "unknown"
    assert verdicts["program.qemu"]["outcome"] == "ok"  # the configuration names it by its path


def test_strict_and_refused_flags(kata: Kata, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # so that something works with less
    assert kata("check").code == 0
    strict = kata("check", "--strict", "--json")
    assert (strict.code, json.loads(strict.stdout)["passed"]) == (1, False)
    assert kata("check", "-s").stderr.startswith("ERROR: --strict: ")
    for flag in ("--check-version-only", "--only-list-releases", "--include-all-releases"):
        refused = kata("check", flag)
        assert (refused.code, refused.stdout) == (1, "")
        assert refused.stderr.startswith(f"kata-runtime: cannot use {flag}: Katapod has no list of releases")


def test_engines_that_are_configured(tmp_path: Path) -> None:
    """In a mount namespace of its own, over which /etc/containerd is ours."""
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "config.toml").write_text('imports = ["/etc/containerd/conf.d/*.toml"]\n')
    packaged = Path(__file__).parents[2] / "packaging/containerd/kata.toml"
    shutil.copy(packaged, tmp_path / "conf.d")
    command = f"mkdir -p /etc/containerd && mount --bind {tmp_path} /etc/containerd && exec {KATA} check --json"
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", command]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=180, check=False)
    verdict = {line["line_id"]: line for line in json.loads(done.stdout)["lines"]}["engine.containerd"]
    assert (verdict["outcome"], verdict["found"].rpartition(", ")[2]) == ("ok", "handler kata")


def script(*arguments: str, path: str = "", before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"}
    argv = [*before, "sh", str(SCRIPT), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=180, check=False, env=environment)


def test_collected_data(
    kata: Kata, guest_image: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROBLEM_LIMIT", "3")
    report, name = tmp_path / "report.md", kata.name()
    secret = "hunTer2x9"
    container = ("busybox", "sh", "-c", "sleep 1000", "sh", "--token", secret, f"https://user:{secret}@host/")
    try:
        kata.ok("run", "--rm", "-d", "--name", name, "-e", f"HARMLESS={secret}", *container, timeout=180)
        done = script("--output", str(report), path=str(Path(KATA).parent))
    finally:
        kata("delete", "--force", name)
    assert done.returncode == 0, done.stderr
    text = report.read_text()
    parts = [line for line in text.splitlines() if line.startswith("<summary>")]
    assert parts[0] == "<summary>Meta</summary>"
    for title in ("Runtime config files", "Packages", "Check", "Sandboxes", "Network namespaces"):
        assert f"<summary>{title}</summary>" in parts
    assert "System is capable of running Kata Containers" in text
    assert f"### {name}: record" in text
    assert f"### {name}: console.log" in text
    assert "sleep 1000" in text
    assert secret not in text
    assert report.stat().st_mode & 0o077 == 0
    assert len(text) < 4 << 20


def test_collected_data_without_a_program_that_works(tmp_path: Path) -> None:
    broken = tmp_path / "kata-runtime"
    broken.write_text("#!/bin/sh\necho 'no module named katapod' >&2\nexit 1\n")
    broken.chmod(0o755)
    done = script(path=str(tmp_path))
    assert done.returncode == 0
    assert "kata-runtime failed with status 1" in done.stderr
    for part in ("uname -a", "qemu-system-x86_64 --version", "no module named katapod"):
        assert part in done.stdout


def test_options_of_the_script() -> None:
    assert "Usage: kata-collect-data.sh" in script("-h").stdout
    assert script("-v").stdout.startswith("kata-collect-data.sh version ")
    wrong = script("--wrong")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    unprivileged = script(before=AS_OTHER_USER)
    assert unprivileged.returncode == 1
    assert "needs root" in unprivileged.stderr
