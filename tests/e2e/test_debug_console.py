"""The debug console: a shell in the VM, of a container of `run` and of a pod of the CRI."""

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.containerd import CONSOLE_CONFIG, Containerd
from kit.cri import Cri, Pod
from kit.kata import Kata, wait_for
from kit.templates import kata_command
from kit.terminal import Terminal, open_terminal

CONFIG_FILE = Path("/etc/kata-containers/configuration.toml")
PROMPT = "[vm] / # "
TOOLS = "ls ip ps mount dmesg ss lsmod free cat vi top"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("console") / "configuration.toml"
    path.write_text(CONSOLE_CONFIG)
    return path


@pytest.fixture(scope="module")
def box(module_kata: Kata, config: Path) -> str:
    name = module_kata.name()
    module_kata._started.append(name)
    module_kata.ok("--config", str(config), "run", "-d", "--name", name, "busybox", "sleep", "77777", timeout=180)
    return name


def _type(terminal: Terminal, line: str) -> None:
    terminal.screen.send(f"{line}\r")


def _open(*args: str) -> contextlib.AbstractContextManager[Terminal]:
    return open_terminal(kata_command("exec", *args), 33, 101)


def _processes(kata: Kata, name: str) -> str:
    return kata.ok("exec", "--vm", name, "ps", "-o", "args")


@pytest.mark.core
def test_a_crun_waits_for_the_next_exec(kata: Kata, box: str) -> None:
    """It runs what comes like any other; what cannot run fails with the same words."""
    kata.ok("exec", box, "true")
    for words, code, said in (
        (("sh", "-c", "echo out; cat /proc/self/oom_score_adj; exit 7"), 7, "out\n0\n"),
        (("-u", "7:8", box, "id", "-u"), 0, "7\n"),
        (("cut", "-d", " ", "-f", "19", "/proc/self/stat"), 0, "0\n"),  # its nice value
        (("no-such-command",), 127, ""),
    ):
        wait_for(lambda: "crun" in _processes(kata, box), "a crun waits")
        result = kata("exec", *words) if box in words else kata("exec", box, *words)
        assert (result.code, result.stdout) == (code, said)
    assert 'exec: "no-such-command": executable file not found in $PATH' in kata("exec", box, "no-such-command").stderr
    assert "crun" not in _processes(kata, box)  # after a failure nothing waits


def test_shell_with_a_terminal(kata: Kata, box: str) -> None:
    with _open(box) as terminal:
        screen = terminal.screen
        screen.expect_exact(PROMPT)
        _type(terminal, "tty; stty size; cat /proc/$$/oom_score_adj; echo $PPID")
        screen.expect(r"/dev/pts/\d+\r\n33 101\r\n0\r\n(\d+)\r\n")
        assert screen.match[1] != "1", "a process of its own, not the agent, holds the shell"

        wait = "echo wait''ing; until stty size | grep -q '41 77'; do sleep 0.1; done; echo resi''zed"
        _type(terminal, wait)
        screen.expect_exact("waiting\r\n")
        terminal.resize(41, 77)
        screen.expect_exact("resized\r\n")

        _type(terminal, "sh -c \"echo sleep''ing; exec sleep 100\"")
        screen.expect_exact("\nsleeping\r\n")
        screen.send("\x03")
        screen.expect_exact(PROMPT)  # not "^C": the shell may be quicker, and turns the echo off
        _type(terminal, "echo status $?")
        screen.expect_exact("status 130\r\n")

        _type(terminal, "echo cat''ting; cat")
        screen.expect_exact("catting\r\n")
        screen.send("\x04")  # ends cat
        screen.expect_exact(PROMPT)
        _type(terminal, "(exit 5)")
        screen.expect_exact(PROMPT)
        screen.send("\x04")  # ends the shell
        assert terminal.wait() == 5
        assert terminal.settings == terminal.settings_before


def test_three_at_once(kata: Kata, box: str) -> None:
    """Each has a terminal of its own, and a busy one does not hold the others up."""
    with _open(box) as one, _open(box) as two, _open(box) as three:
        for terminal in (one, two, three):
            terminal.screen.expect_exact(PROMPT)
        _type(one, "yes")  # nobody reads it: this one stalls
        seen = set()
        for number, terminal in enumerate((two, three)):
            _type(terminal, f"tty; echo num''ber {number}")
            terminal.screen.expect(r"(/dev/pts/\d+)\r\nnumber (\d)\r\n")
            assert terminal.screen.match[2] == str(number)
            seen.add(terminal.screen.match[1])
        assert len(seen) == 2
        one.screen.send("\x03")
        _type(two, "exit 4")
        assert two.wait() == 4
        three.process.terminate()  # a shell ignores SIGTERM, but not that its user hangs up
        assert three.wait() == 128 + signal.SIGHUP


def test_commands_and_pipes(kata: Kata, box: str) -> None:
    assert kata("exec", "--vm", box, "sh", "-c", "echo out; echo err >&2; exit 7") == (7, "out\n", "err\n")
    assert kata("exec", box, input="cd /proc\npwd\necho err >&2\nexit 3\n") == (3, "/proc\n", "err\n")
    assert kata("exec", "--kata-debug-port", "1026", box, input="echo hello") == (0, "hello\n", "")
    assert kata("exec", "-i", "--vm", box, "wc", "-c", input=b"x" * 300_000) == (0, "300000\n", "")
    assert kata.ok("exec", "-e", "A=b c", "-w", "/proc/sys", "--vm", box, "sh", "-c", "echo $A; pwd") == (
        "b c\n/proc/sys\n"
    )
    code, out, err = kata("exec", "--vm", box, "no-such-command")
    assert (code, out) == (127, "")
    assert err.startswith('kata-runtime: cannot run "no-such-command" in the VM')
    assert kata("exec", "--vm", box, "/etc/passwd").code == 126
    assert kata("exec", "--vm", "-w", "/none", box, "true").code == 125
    assert "as root" in kata("exec", "--vm", "-u", "5", box, "true").stderr
    code, _, err = kata("exec", "--kata-debug-port", "1099", box)
    assert code == 125
    assert "serial port" in err
    # with a command, and no --vm, it is the container
    assert kata.ok("exec", box, "cat", "/proc/1/comm") == "sleep\n"
    assert kata.ok("exec", "--vm", box, "cat", "/proc/1/comm") == "init\n"


def test_what_the_container_sees(kata: Kata, box: str) -> None:
    """Neither the console's port nor its tools."""
    found = kata.ok("exec", box, "sh", "-c", "ls /dev; ls -d /usr/bin/ss /usr/bin/kata-agent 2>&1; mount")
    assert "vport" not in found
    assert found.count("No such file") == 2
    assert "virtio-ports" not in kata("exec", box, "sh", "-c", "cat /dev/vport0p2").stdout
    assert "kata-console" in _processes(kata, box) or "{kata-console}" in kata.ok("exec", "--vm", box, "ps")
    assert "kata-console" not in kata.ok("exec", box, "ps")


def test_shell_ends_with_a_killed_client(kata: Kata, box: str) -> None:
    with kata.spawn("exec", box, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as piped, _open(box) as terminal:
        assert piped.stdin is not None
        assert piped.stdout is not None
        piped.stdin.write(b"echo up; sleep 55555\n")
        piped.stdin.flush()
        assert piped.stdout.readline() == b"up\n"
        terminal.screen.expect_exact(PROMPT)
        _type(terminal, "sh -c \"echo sleep''ing; exec sleep 66666\"")
        terminal.screen.expect_exact("\nsleeping\r\n")
        shown = _processes(kata, box)
        assert "sleep 55555" in shown
        assert "sleep 66666" in shown
        os.kill(piped.pid, signal.SIGKILL)
        os.kill(terminal.process.pid, signal.SIGKILL)
        wait_for(lambda: not re.search(r"sleep (5|6)\d{4}", _processes(kata, box)), "the shells end")
    shells = [line for line in _processes(kata, box).splitlines() if line in ("sh", "-sh")]
    assert shells == []


def test_console_of_an_agent_that_hangs(kata: Kata, box: str) -> None:
    """PID 1 takes no SIGSTOP, but a cgroup that is frozen takes it."""
    ice = "/sys/fs/cgroup/ice"
    freeze = f"mkdir {ice} && echo 1 >{ice}/cgroup.procs && echo 1 >{ice}/cgroup.freeze"
    kata.ok("exec", "--vm", box, "sh", "-c", freeze)
    with kata.spawn("exec", box, "echo", "at last", stdout=subprocess.PIPE) as waiting:
        wait_for(lambda: "frozen 1" in kata.ok("exec", "--vm", box, "cat", f"{ice}/cgroup.events"), "it hangs")
        with _open(box) as terminal:
            terminal.screen.expect_exact(PROMPT)
            assert waiting.poll() is None
            _type(terminal, f"echo 0 >{ice}/cgroup.freeze; exit")
            assert terminal.wait() == 0
        assert waiting.communicate(timeout=180)[0] == b"at last\n"


def test_vm_that_dies_under_a_console(kata: Kata, config: Path) -> None:
    name = kata.name()
    kata._started.append(name)
    kata.ok("--config", str(config), "run", "-d", "--rm", "--name", name, "busybox", "sleep", "77777", timeout=180)
    with _open(name) as terminal:
        terminal.screen.expect_exact(PROMPT)
        os.kill(kata.listed(name)["vmm_pid"], signal.SIGKILL)
        terminal.screen.expect_exact(f"the debug console of {name} was cut off: ", timeout=180)
        assert terminal.wait() == 125
        assert terminal.settings == terminal.settings_before


def test_off_by_default(kata: Kata) -> None:
    name = kata.start("busybox", "sleep", "77777")
    for arguments in ([name], ["--vm", name, "true"]):
        code, out, err = kata("exec", *arguments, input="")
        assert (code, out) == (125, "")
        assert f"cannot use the debug console of {name}: it is off" in err
        assert f"debug_console_enabled = true in the table [agent.kata] of {CONFIG_FILE}" in err
        assert "start the container again" in err
    code, _, err = kata("exec", "no-such-container")
    assert code == 125
    assert "no such container" in err


@pytest.fixture
def console_cri(node: Containerd) -> Iterator[Cri]:
    """Pods whose shim has a configuration file with the console switched on."""
    node.forget()
    found = Cri(node, "kata-console")
    try:
        yield found
        found.remove_all()
    finally:
        found.close()


def _mounts(text: str) -> list[tuple[str, str, str]]:
    return [(line.split()[0], line.split()[2], line.split()[4]) for line in text.splitlines()]


@pytest.mark.qemu("what the walkthrough shows of a guest is of QEMU's")
def test_console_of_a_pod(console_cri: Cri, kata: Kata, guest_image: dict[str, Any]) -> None:
    """The walkthrough's tour of a pod's VM."""
    pod = console_cri.run_pod(dns_config={"servers": ["192.0.2.53"], "searches": ["tests.example"]})
    container = pod.start("sleep", "77777")
    short = pod.id[:12]

    def vm(*command: str) -> str:
        return kata.ok("exec", short, *command)

    assert vm("uname", "-nr").split() == [pod.config["hostname"], guest_image["kernel_version"]]
    assert kata.ok("exec", container[:12], "sh", "-c", "test -e /init || echo container") == "container\n"
    assert vm("cat", "/proc/cmdline").endswith(" agent.debug_console agent.debug_console_vport=1026\n")
    modules = {line.split()[0] for line in vm("lsmod").splitlines()[1:]}
    assert {"virtiofs", "fuse", "virtio_blk", "virtio_console", "virtio_net", "vsock"} <= modules
    share = "/run/kata-containers"
    assert {
        ("rootfs", "/", "rootfs"),
        ("sysfs", "/sys", "sysfs"),
        ("proc", "/proc", "proc"),
        ("devtmpfs", "/dev", "devtmpfs"),
        ("tmpfs", "/dev/shm", "tmpfs"),
        ("devpts", "/dev/pts", "devpts"),
        ("tmpfs", "/run", "tmpfs"),
        ("tmpfs", "/tmp", "tmpfs"),
        ("nsfs", "/run/sandbox-ns/ipc", "nsfs"),
        ("nsfs", "/run/sandbox-ns/uts", "nsfs"),
        ("kataShared", f"{share}/shared/containers", "virtiofs"),
        ("shm", f"{share}/sandbox/shm", "tmpfs"),
        ("tmpfs", "/etc/resolv.conf", "tmpfs"),
        # the kernel gives no source to what virtiofsd announces as a mount of its own
        ("none", f"{share}/{pod.id}/rootfs", "virtiofs"),
        ("none", f"{share}/{container}/rootfs", "virtiofs"),
    } <= set(_mounts(vm("mount")))
    assert "nameserver 192.0.2.53" in vm("cat", "/etc/resolv.conf")
    total_mib = int(vm("free", "-m").splitlines()[1].split()[1])
    assert 1900 <= total_mib <= 2048
    shown = vm("ps")
    for wanted in ("init", "kata-console", "sleep 1000000", "sleep 77777"):
        assert wanted in shown
    assert vm("sh", "-c", f"for tool in {TOOLS}; do command -v $tool >/dev/null || echo no $tool; done") == ""
    assert pod.addresses[0] in vm("ip", "addr", "show", "eth0")
    assert "Netid" in vm("ss", "-anp")
    assert "Local Address" in vm("ss", "-lt")
    with _open(short) as terminal:
        terminal.screen.expect_exact(PROMPT)
        _type(terminal, "cd /etc; echo *")
        terminal.screen.expect_exact("passwd resolv.conf")
        pod_id = pod.id
        pod.stop_and_remove()
        terminal.screen.expect_exact(f"the debug console of {pod_id} was cut off: the sandbox has ended", timeout=180)
        assert terminal.wait() == 125
        assert terminal.settings == terminal.settings_before
    assert "no such container" in kata("exec", short).stderr


def test_console_of_a_pod_is_off_by_default(cri: Cri, kata: Kata) -> None:
    pod: Pod = cri.run_pod()
    code, _, err = kata("exec", pod.id)
    assert code == 125
    assert "it is off" in err
    assert "start the pod again" in err
