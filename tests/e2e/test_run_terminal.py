"""`-t`: a terminal inside, and the caller's own one as it was, whatever happens."""

import os
import signal
import subprocess

import pytest

from kit.accel import vmm_name
from kit.kata import Kata
from kit.templates import kata_command
from kit.terminal import Terminal, open_terminal

PROMPT = "ready> "


@pytest.fixture(scope="module")
def box(module_kata: Kata) -> str:
    return module_kata.start("busybox", "sleep", "1000")


def _type(terminal: Terminal, line: str) -> None:
    terminal.screen.send(f"{line}\r")


def _expect_restored(terminal: Terminal) -> None:
    assert terminal.settings == terminal.settings_before


def _check_session(terminal: Terminal) -> None:
    """A shell's session: size, resize, keys that make signals, end of input and status."""
    screen = terminal.screen
    _type(terminal, "PS1='ready''> '")
    screen.expect_exact(f"\n{PROMPT}")
    assert terminal.settings != terminal.settings_before, "keys are passed on as they are"

    _type(terminal, "tty; stty size")
    screen.expect(r"/dev/pts/\d+\r\n33 101\r\n")
    screen.expect_exact(PROMPT)

    # a shell of its own, so that it and its `sleep` are one foreground group, which gets the signal
    wait = "trap 'echo sig''nalled' WINCH; echo wait''ing; until stty size | grep -q '41 77'; do sleep 0.1; done"
    _type(terminal, f'sh -c "{wait}; sleep 0.1; echo done"')
    screen.expect_exact("waiting\r\n")
    terminal.resize(41, 77)
    screen.expect_exact("signalled\r\n")
    screen.expect_exact("done\r\n")

    # said by the program that has the terminal: the shell itself would take the key before it has started one
    _type(terminal, "sh -c \"echo sleep''ing; exec sleep 100\"; echo status $?")
    screen.expect_exact("\nsleeping\r\n")
    screen.send("\x03")
    screen.expect_exact(PROMPT)  # not "^C": the shell may be quicker, and turns the echo off
    _type(terminal, "echo after''wards")
    screen.expect_exact("\nafterwards\r\n")

    _type(terminal, "echo cat''ting; cat")
    screen.expect_exact("catting\r\n")
    _type(terminal, "typed")
    screen.expect_exact("typed\r\ntyped\r\n")
    screen.send("\x04")  # ends cat
    screen.expect_exact(PROMPT)

    _type(terminal, "(exit 5)")
    screen.expect_exact(PROMPT)
    screen.send("\x04")  # ends the shell
    assert terminal.wait() == 5
    _expect_restored(terminal)


@pytest.mark.core
def test_session_of_run(kata: Kata) -> None:
    with open_terminal(kata_command("run", "--rm", "-it", "--name", kata.name(), "busybox", "sh"), 33, 101) as terminal:
        terminal.screen.expect_exact("/ # ", timeout=180)
        _check_session(terminal)


def test_session_of_exec(kata: Kata, box: str) -> None:
    with open_terminal(kata_command("exec", "-it", box, "sh"), 33, 101) as terminal:
        terminal.screen.expect_exact("/ # ")
        _check_session(terminal)


def test_terminal_is_restored_when_the_vm_dies(kata: Kata) -> None:
    name = kata.name()
    with open_terminal(kata_command("run", "--rm", "-it", "--name", name, "busybox", "sh")) as terminal:
        terminal.screen.expect_exact("/ # ", timeout=180)
        assert terminal.settings != terminal.settings_before
        os.kill(kata.listed(name)["vmm_pid"], signal.SIGKILL)
        terminal.screen.expect_exact("kata-runtime: ", timeout=180)
        terminal.screen.expect(f"{vmm_name()}.*SIGKILL")
        assert terminal.wait() == 125
        _expect_restored(terminal)


def test_terminal_is_restored_when_the_vm_dies_under_an_exec(kata: Kata) -> None:
    name = kata.start("--rm", "busybox", "sleep", "1000")
    with open_terminal(kata_command("exec", "-it", name, "sh")) as terminal:
        terminal.screen.expect_exact("/ # ")
        os.kill(kata.listed(name)["vmm_pid"], signal.SIGKILL)
        terminal.screen.expect_exact("kata-runtime: ", timeout=180)
        assert terminal.wait() == 125
        _expect_restored(terminal)


def test_terminal_is_restored_when_the_command_is_unknown(kata: Kata, box: str) -> None:
    with open_terminal(kata_command("exec", "-it", box, "no-such-command")) as terminal:
        terminal.screen.expect_exact('exec: "no-such-command"')
        assert terminal.wait() == 127
        _expect_restored(terminal)
    with open_terminal(
        kata_command("run", "--rm", "-it", "--name", kata.name(), "busybox", "no-such-command")
    ) as terminal:
        terminal.screen.expect_exact('exec: "no-such-command"', timeout=180)
        assert terminal.wait() == 127
        _expect_restored(terminal)


def test_terminal_without_input(kata: Kata, box: str) -> None:
    """-t alone: a terminal inside, whoever calls."""
    code, out, err = kata("exec", "-t", box, "sh", "-c", "test -t 0 && test -t 1 && test -t 2 && echo $TERM")
    assert (code, out, err) == (0, "xterm\r\n", "")


def test_interactive_terminal_needs_a_terminal(kata: Kata, box: str) -> None:
    code, out, err = kata("exec", "-it", box, "sh", input="true\n")
    assert (code, out) == (125, "")
    assert "standard input is not a terminal" in err


def test_exec_that_is_killed_leaves_the_terminal_restored_by_its_caller(kata: Kata, box: str) -> None:
    """SIGTERM to the exec reaches the command, which ends; the terminal is restored."""
    with open_terminal(kata_command("exec", "-it", box, "sh", "-c", "echo up; exec sleep 1000")) as terminal:
        terminal.screen.expect_exact("up")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.wait() == 128 + signal.SIGTERM
        _expect_restored(terminal)
    assert (
        subprocess.run(kata_command("exec", box, "pidof", "sleep"), check=False, stdout=subprocess.PIPE).stdout != b""
    )
