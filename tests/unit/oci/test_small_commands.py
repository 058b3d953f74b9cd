"""Commands that need no container: signals, limits, spec, features, --version, errors and their log."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from katapod.model import oci
from katapod.oci.arguments import Call, parse_call
from katapod.oci.errors import OciError
from katapod.oci.looking import _seconds
from katapod.oci.signalling import parse_signal
from katapod.oci.starter_spec import starter_spec
from katapod.oci.updating import resources_of


class Done(NamedTuple):
    code: int
    out: str
    err: str


def run(*words: str, cwd: Path | None = None) -> Done:
    program = "import sys; from katapod.cli.entry import main; sys.argv[0] = 'kata-runtime'; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=cwd, timeout=60, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9", 9),
        ("KILL", 9),
        ("SIGKILL", 9),
        ("sigterm", 15),
        ("0", 0),
        ("RTMIN+3", 37),
        ("SIGRTMAX-1", 63),
        ("SYS", 31),
    ],
)
def test_signals(text: str, number: int) -> None:
    assert parse_signal(text) == number


@pytest.mark.parametrize("text", ["", "NOSUCH", "65", "-1", "9x", "RTMIN+99", "SIGSIG", "9" * 30, "٩"])
def test_what_is_no_signal(text: str) -> None:
    with pytest.raises(OciError, match="unknown signal"):
        parse_signal(text)


def resources(*words: str) -> dict[str, object]:
    call = Call()
    parse_call(["update", *words, "c1"], call)
    text = resources_of(call)
    oci.parse_resources(text.encode())  # as the supervisor does
    found: dict[str, object] = json.loads(text)
    return found


def test_limits_by_options() -> None:
    assert resources("--memory", "512m", "--cpu-quota=50000", "--cpu-period=100000", "--pids-limit", "-1") == {
        "memory": {"limit": 512 << 20},
        "cpu": {"quota": 50000, "period": 100000},
        "pids": {"limit": -1},
    }


def test_limits_of_a_file_count_alone(tmp_path: Path) -> None:
    (tmp_path / "r").write_text('{"pids": {"limit": 5}}')
    assert resources("--memory", "1g", "-r", str(tmp_path / "r")) == {"pids": {"limit": 5}}


def test_limits_of_the_standard_input(tmp_path: Path) -> None:
    """Whole, or refused: never the part that fits."""
    saved = os.dup(0)
    try:
        for text in ('{"pids": {"limit": 5}}', '{"pids": {"limit": 5}}' + " " * (1 << 20)):
            (tmp_path / "r").write_text(text)
            with (tmp_path / "r").open() as handle:
                os.dup2(handle.fileno(), 0)
            if len(text) < 100:
                assert resources("-r", "-") == {"pids": {"limit": 5}}
            else:
                with pytest.raises(OciError, match="more than 1048576 bytes"):
                    resources("-r", "-")
    finally:
        os.dup2(saved, 0)
        os.close(saved)


@pytest.mark.parametrize(
    "words", [("--memory", "much"), ("--pids-limit", "5m"), ("--l3-cache-schema", "x"), ("-r", "/no")]
)
def test_limits_that_are_none(words: tuple[str, ...]) -> None:
    with pytest.raises(OciError, match=words[0].lstrip("-") if words[0] != "-r" else "/no"):
        resources(*words)


@pytest.mark.parametrize(("text", "seconds"), [("5s", 5.0), ("500ms", 0.5), ("1.5m", 90.0), ("1h", 3600.0)])
def test_intervals(text: str, seconds: float) -> None:
    assert _seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "s", "-1s", "0s", "1x"])
def test_what_is_no_interval(text: str) -> None:
    with pytest.raises(OciError, match="duration"):
        _seconds(text)


@pytest.mark.parametrize("rootless", [True, False])
def test_the_starter_spec_is_a_spec(rootless: bool) -> None:
    spec = oci.parse_spec(json.dumps(starter_spec(rootless=rootless)).encode())
    assert spec.process.args == ("sh",)
    assert spec.process.terminal
    assert bool(spec.linux.uid_mappings) is rootless


def test_spec_overwrites_nothing(tmp_path: Path) -> None:
    assert run("spec", cwd=tmp_path) == Done(0, "", "")
    before = (tmp_path / "config.json").read_bytes()
    done = run("spec", "--bundle", str(tmp_path))
    assert (done.code, "file config.json exists" in done.err) == (1, True)
    assert (tmp_path / "config.json").read_bytes() == before


def test_features_and_version() -> None:
    assert json.loads(run("features").out)["ociVersionMin"] == "1.0.0"
    lines = run("--root", "/nowhere", "--version").out.splitlines()
    assert [line.split()[0] for line in lines] == ["kata-runtime", "commit:", "spec:"]


def test_checkpoints_are_refused_where_podman_asks() -> None:
    assert run("checkpoint", "--help").code != 0
    assert "flag needs an argument" in run("restore", "--lsm-mount-context").err


def test_a_container_that_is_not_there(tmp_path: Path) -> None:
    for verb in ("state", "start", "kill", "delete", "pause", "ps", "checkpoint"):
        done = run("--root", str(tmp_path), verb, "c1")
        assert (done.code, done.out) == (1, "")
        assert "does not exist" in done.err
    assert run("--root", str(tmp_path), "delete", "--force", "c1") == Done(0, "", "")
    assert run("--root", str(tmp_path), "exec", "c1", "ls").code == 255
    assert run("--root", str(tmp_path), "list", "--format", "json").out == "null\n"


def test_an_error_is_the_only_line_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run("--root", str(tmp_path), "--log", str(log), "--log-format", "json", "state", "c1")
    entry = json.loads(log.read_text())
    assert entry["level"] == "error"
    assert "does not exist" in entry["msg"]
    assert entry["time"].endswith("Z")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "not found: No such file or directory"),
        ("{", "not JSON"),
        ("[]", "not an object"),
        ('{"process": {"terminal": true}}', "without setting console socket"),
        ('{"linux": {"namespaces": [{"type": "network", "path": "/proc/self/ns/net"}]}}', "host's network"),
        ('{"linux": {"namespaces": [{"type": "network", "path": "/no/such"}]}}', "/no/such: No such file"),
    ],
)
def test_a_bundle_that_is_none_leaves_nothing(tmp_path: Path, config: str | None, said: str) -> None:
    bundle, root = tmp_path / "b", tmp_path / "r"
    bundle.mkdir()
    root.mkdir()
    if config is not None:
        (bundle / "config.json").write_text(config)
    done = run("--root", str(root), "create", "--bundle", str(bundle), "c1")
    assert done.code == 1
    assert said in done.err
    assert os.listdir(root) == []


def test_descriptors_are_refused(tmp_path: Path) -> None:
    done = run("--root", str(tmp_path), "create", "--preserve-fds", "2", "c1")
    assert (done.code, "--preserve-fds" in done.err) == (1, True)


def test_commands_load_little() -> None:
    heavy = ("asyncio", "click", "msgspec", "argparse", "typing", "subprocess", "google.protobuf", "ctypes")
    program = (
        "import sys, os; from katapod.cli.entry import main; sys.argv[0] = 'kata-runtime'\n"
        "os._exit = lambda status: (_ for _ in ()).throw(SystemExit(status))\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print(*[name for name in {heavy!r} if name in sys.modules])"
    )
    for verb in ("state", "start", "kill", "delete", "pause", "exec"):
        words = [verb, "no-such-container", *(["ls"] if verb == "exec" else [])]
        done = subprocess.run(
            [
                sys.executable,
                "-S",
                "-c",
                f"import sys; sys.path[:0] = {sys.path!r}\n{program}",
                "--root",
                "/no",
                *words,
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stdout.split() == [], f"{verb}: {done}"
