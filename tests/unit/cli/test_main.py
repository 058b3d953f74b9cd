"""`kata-runtime` as a program: what it prints where, and its exit statuses. No root is needed."""

import os
import signal
import socket
import subprocess
import sys

import click
import pytest

from katapod import __version__
from katapod.cli.main import call, explain
from katapod.cli.settings import Globals, print_error
from katapod.model.errors import KatapodError
from katapod.observe.management_server import management_server

# who may read everything: the sources may be in /root
OTHER_USER = ["setpriv", "--reuid=65534", "--clear-groups"]
OTHER_USER += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]
AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root may serve")
MAIN = "from katapod.cli.main import main; main()"


def kata(*arguments: str, as_user: bool = False, **options: object) -> subprocess.CompletedProcess[str]:
    become = OTHER_USER if as_user and os.getuid() == 0 else []
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [*become, sys.executable, "-W", "error", "-c", MAIN, *arguments],
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
        **options,
    )


def test_a_sandbox_of_run_answers_on_the_management_socket() -> None:
    assert Globals().run_context().servers == (management_server,)


def test_version() -> None:
    for arguments in (["--version"], ["-v"], ["version"]):
        done = kata(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"kata-runtime  : {__version__}\n")


def test_help() -> None:
    for arguments in ([], ["--help"], ["-h"]):
        done = kata(*arguments)
        assert done.returncode == 0, done.stderr
        assert "Run containers, each in a small virtual machine" in done.stdout + done.stderr
        for verb in ("run", "exec", "list", "logs", "kill", "pause", "resume", "stats", "delete", "image", "factory"):
            assert f"  {verb} " in done.stdout + done.stderr


@pytest.mark.parametrize("verb", ["run", "exec", "list", "logs", "kill", "pause", "resume", "stats", "delete"])
def test_every_verb_has_help(verb: str) -> None:
    done = kata(verb, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: kata-runtime" in done.stdout


def test_config_paths() -> None:
    for flag in ("--show-default-config-paths", "--kata-show-default-config-paths"):
        done = kata(flag)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == [
            "/etc/kata-containers/configuration.toml",
            "/usr/share/kata-containers/defaults/configuration.toml",
        ]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["frobnicate"], 1, "No such command 'frobnicate'.\n"),
        (["lits"], 1, "No such command 'lits'. Did you mean list?"),
        (["biuld", "."], 1, "No such command 'biuld'. Did you mean build?"),
        (["inspct", "x"], 1, "No such command 'inspct'. Did you mean inspect?"),
        (["build", "."], 1, "there is no build: images are built by others\n  hint: buildah build"),
        (["login"], 1, "hint: skopeo login HOST"),
        (["container", "frobnicate"], 1, "No such command"),
        (["--frobnicate"], 1, "No such option"),
        (["list", "--frobnicate"], 1, "No such option"),
        (["kill"], 1, "Missing argument"),
        (["run", "--frobnicate"], 125, "No such option"),
        (["exec"], 125, "Missing argument"),
        (["container", "run", "--frobnicate"], 125, "No such option"),
        (["--config", "list", "run", "--frobnicate"], 125, "No such option"),
        (["--debug", "exec"], 125, "Missing argument"),
    ],
)
def test_wrong_usage(arguments: list[str], status: int, words: str) -> None:
    """125 where the status could be taken for the container's, as with Docker and Podman."""
    done = kata(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("verb", "status"), [("run", 125), ("exec", 125), ("kill", 1), ("logs", 1), ("delete", 1), ("stats", 1)]
)
def test_another_user_is_told_to_be_root(verb: str, status: int) -> None:
    words = {"exec": ["name", "true"], "stats": []}.get(verb, ["name"])
    done = kata(verb, *words, as_user=True)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr == f"kata-runtime: cannot {verb}: this needs root\n  hint: sudo kata-runtime {verb} ...\n"


SHIM = "from katapod.shim.main import main; main()"
MONITOR = "import sys; from katapod.monitor.main import main; sys.exit(main())"


@pytest.mark.parametrize(
    ("program", "words", "status"),
    [
        (MAIN, "--version", 141),
        (MAIN, "run --help", 141),
        (MAIN, "config --help", 141),
        (SHIM, "--version", -signal.SIGPIPE),
        (SHIM, "--help", -signal.SIGPIPE),
        (SHIM, "-info", -signal.SIGPIPE),
        (MONITOR, "--version", -signal.SIGPIPE),
        (MONITOR, "--help", -signal.SIGPIPE),
        pytest.param(MONITOR, "--listen-address 127.0.0.1:0", 141, marks=AS_ROOT),
    ],
)
def test_output_that_nobody_reads(program: str, words: str, status: int) -> None:
    """As in `kata-runtime --version | true`: a shell shows 141, and nothing is said."""
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program, *words.split()],
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=subprocess.PIPE,
    ) as child:
        os.close(writer)
        _, said = child.communicate(timeout=60)
    assert (child.returncode, said) == (status, b"")


@pytest.mark.parametrize("buffered", [True, False])
def test_output_that_there_is_no_room_for(buffered: bool) -> None:
    command = [sys.executable, *([] if buffered else ["-u"]), "-W", "error", "-c", MAIN, "version"]
    buffering = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=buffering, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("No space left on device\n")


def test_a_pipe_of_its_own_that_breaks_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    """Not everything that breaks is our output."""

    def ask() -> None:
        near, far = socket.socketpair()
        with near:
            far.close()
            near.send(b"x")

    with pytest.raises(BrokenPipeError) as broken:
        call(click.Command("ask", callback=ask), [])
    assert explain(broken.value, "list") == 1
    assert "Broken pipe" in capfd.readouterr().err


def test_control_characters_of_an_error_stay_out_of_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Errors quote guests, images and other programs."""
    print_error(KatapodError("cannot run \x1b]0;title\x07x:\n\tlines stay\x9b", hint="a\x1b[2Jb"))
    assert (
        capsys.readouterr().err
        == "kata-runtime: cannot run \\u001b]0;title\\u0007x:\n\tlines stay\\u009b\n  hint: a\\u001b[2Jb\n"
    )


def test_a_module_of_the_verb_only_is_loaded() -> None:
    """Each start waits for its imports."""
    script = "import sys\nsys.argv = ['kata-runtime', '--version']\nfrom katapod.cli.main import main\n"
    script += "try:\n    main()\nfinally:\n    print([n for n in sys.modules if n.startswith('katapod.sandbox')])"
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("words", [["version"], ["--version"], ["--help"], ["-h"]])
def test_what_needs_no_verb_loads_none(words: list[str]) -> None:
    """`version` and `--help` are asked by scripts and by hand: they answer at once."""
    heavy = ["typer", "msgspec", "asyncio", "json", "pathlib", "google.protobuf", "rich", "katapod.cli.run"]
    loaded = _modules_of(words)
    assert "click" in loaded
    assert [name for name in heavy if name in loaded] == []


def test_list_loads_neither_an_event_loop_nor_the_flags_of_run() -> None:
    heavy = ["asyncio", "google.protobuf", "rich", "katapod.cli.run", "katapod.model.flags"]
    loaded = _modules_of(["list"])
    assert "katapod.cli.containers" in loaded
    assert [name for name in heavy if name in loaded] == []


def _modules_of(words: list[str]) -> list[str]:
    """What is in sys.modules when `kata-runtime` has answered; -S: not what site-packages' .pth files load."""
    code = f"import sys; sys.path.extend({sys.path!r}); sys.argv = ['kata-runtime', *{words!r}]\n"
    code += "from katapod.cli.entry import main\n"
    code += "try:\n    main()\nfinally:\n    sys.stderr.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-S", "-c", code], text=True, capture_output=True, timeout=60, check=False)
    return done.stderr.split()


@pytest.mark.parametrize("module", ["katapod.cli.run", "katapod.supervisor.run", "katapod.sandbox.lifecycle"])
def test_ctrl_c_ends_a_run_that_is_still_being_loaded(module: str) -> None:
    """As an exception it could be lost in an import: then nothing would tell the run that it was pressed."""
    script = f"""
import signal, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            print("at", name, signal.getsignal(signal.SIGINT) is signal.SIG_DFL, flush=True)

sys.meta_path.insert(0, Watch())
sys.argv = ["kata-runtime", "run", "--bundle", "/none", "word"]
from katapod.cli.entry import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == f"at {module} True\n", done.stderr
