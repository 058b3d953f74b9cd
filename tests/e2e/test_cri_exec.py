"""Streams through the CRI: exec, attach, port-forward and logs."""

import datetime

import pytest

from kit.cri import Cri, CriError, Pod
from kit.cri_stream import DATA, ERROR, Stream, open_stream, open_tunnel
from kit.kata import wait_for

SLEEP = ("sleep", "100000")


def open_exec(pod: Pod, container: str, *command: str, tty: bool = False, stdin: bool = True) -> Stream:
    answer = pod.cri("Exec", container_id=container, cmd=command, tty=tty, stdin=stdin, stdout=True, stderr=not tty)
    return open_stream(answer.url, pod.cri.node.netns)


@pytest.mark.reference
@pytest.mark.parametrize("code", [0, 1, 7, 127, 255])
def test_exec_sync(pod: Pod, code: int) -> None:
    container = pod.start(*SLEEP)
    result = pod.exec(container, "sh", "-c", f"echo out; echo err >&2; exit {code}")
    assert result == (code, "out\n", "err\n")


def test_exec_sync_of_much(pod: Pod) -> None:
    container = pod.start(*SLEEP)
    answer = pod.cri("ExecSync", container_id=container, cmd=["sh", "-c", "yes | head -c 1000000"], timeout=60)
    assert (answer.exit_code, len(answer.stdout)) == (0, 1_000_000)


def test_exec_sync_has_a_time_limit(pod: Pod) -> None:
    """The call ends with an error, and so does the command."""
    container = pod.start(*SLEEP)
    with pytest.raises(CriError, match=r"(?i)timeout|timed out|deadline"):
        pod.cri("ExecSync", container_id=container, cmd=["sleep", "77777"], timeout=1)
    wait_for(lambda: "77777" not in pod.sh(container, "ps -o args"), "the command is gone")


@pytest.mark.reference
def test_exec_sync_of_what_does_not_exist(pod: Pod) -> None:
    container = pod.start(*SLEEP)
    with pytest.raises(CriError, match="/no/such/program"):
        pod.exec(container, "/no/such/program")
    with pytest.raises(CriError, match=r'exec: "nowhere": executable file not found in \$PATH'):
        pod.exec(container, "nowhere")
    with pytest.raises(CriError, match=r'exec: "/etc/passwd": permission denied'):
        pod.exec(container, "/etc/passwd")
    with pytest.raises(CriError, match=r'exec: "nowhere": executable file not found in \$PATH'):
        pod.start("nowhere")
    with pytest.raises(CriError, match="no-such-container"):
        pod.exec("no-such-container", "true")
    pod.cri("StopContainer", container_id=container, timeout=0)
    with pytest.raises(CriError, match=r"(?i)not.*running|exited"):
        pod.exec(container, "true")


@pytest.mark.reference
def test_what_an_exec_leaves_in_the_background_is_heard(pod: Pod) -> None:
    """The call goes on until the last writer has closed the streams."""
    container = pod.start(*SLEEP)
    script = "(sleep 3; echo late; sleep 1; echo last) & echo now; exit 4"
    assert pod.exec(container, "sh", "-c", script) == (4, "now\nlate\nlast\n", "")
    assert pod.exec(container, "sh", "-c", "sleep 1000 > /dev/null 2>&1 & exit 5").code == 5


@pytest.mark.reference
def test_exec_streams(pod: Pod) -> None:
    """Without a terminal the streams stay apart."""
    container = pod.start(*SLEEP)
    script = "echo err >&2; while read word; do echo got $word; test $word = end && exit 6; done"
    with open_exec(pod, container, "sh", "-c", script) as stream:
        stream.send(b"one\n")
        stream.expect(rb"got one\n")
        stream.send(b"end\n")
        assert stream.finish() == 6
        assert (stream.received[1], stream.received[2]) == (b"got one\ngot end\n", b"err\n")


@pytest.mark.reference
def test_exec_with_a_terminal(pod: Pod) -> None:
    container = pod.start(*SLEEP)
    with open_exec(pod, container, "sh", tty=True) as stream:
        stream.expect(b"# ")
        stream.resize(97, 31)
        stream.send(b"until stty size | grep -q '31 97'; do sleep 0.2; done; echo si''zed\n")
        stream.expect(b"sized")
        stream.send(b"tty && echo err >&2; trap 'echo inter''rupted' INT; echo lis''tens; sleep 77777\n")
        stream.expect(rb"/dev/pts/\d+\r\nerr\r\nlistens\r\n")
        wait_for(lambda: "sleep 77777" in pod.sh(container, "ps -o args | grep -v grep"), "the program in front")
        stream.send(b"\x03")
        stream.expect(b"interrupted")
        stream.send(b"exit 9\n")
        assert stream.finish() == 9


@pytest.mark.reference
def test_attach(pod: Pod) -> None:
    """To the streams of a container that runs; what it says goes to its log too.

    containerd may pass on what it gets before it has attached the output, which would be missed: so the container says
    something all the time, and nothing is sent before that is heard.
    """
    ticking = "while sleep 0.1; do echo tick; done & "
    container = pod.start(
        *("sh", "-c", f"{ticking}while read word; do echo got $word; test $word = end && exit 8; done"), stdin=True
    )
    for word in ("one", "end"):
        answer = pod.cri("Attach", container_id=container, stdin=True, stdout=True, stderr=True)
        with open_stream(answer.url, pod.cri.node.netns) as stream:
            stream.expect(rb"tick\n")
            stream.send(f"{word}\n".encode())
            stream.expect(rf"got {word}\n".encode())
    assert pod.wait_exit(container) == 8
    assert [line for line in pod.log_text(container) if line != "tick"] == ["got one", "got end"]


def test_attach_with_a_terminal(pod: Pod) -> None:
    container = pod.start("sh", stdin=True, tty=True)
    answer = pod.cri("Attach", container_id=container, stdin=True, stdout=True, tty=True)
    with open_stream(answer.url, pod.cri.node.netns) as stream:
        stream.send(b"tty; echo re''ady\n")
        stream.expect(rb"/dev/(pts/\d+|console)\r\nready")
        stream.send(b"exit 5\n")
        assert pod.wait_exit(container) == 5


@pytest.mark.reference
def test_log_format(pod: Pod) -> None:
    """TIME STREAM TAG TEXT, where a line beyond 16 KiB comes in parts."""
    script = "echo to out; echo to err >&2; sleep 0.2; head -c 20000 /dev/zero | tr '\\0' x; echo; printf unfinished"
    container = pod.start("sh", "-c", script)
    assert pod.wait_exit(container) == 0
    wait_for(lambda: "unfinished" in pod.log_text(container), "the log is complete")
    lines = pod.log(container)
    for line in lines:
        assert datetime.datetime.fromisoformat(line.time[:19]).year > 2000
    out = [(line.tag, line.text) for line in lines if line.stream == "stdout"]
    assert [(line.tag, line.text) for line in lines if line.stream == "stderr"] == [("F", "to err")]
    assert out[0] == ("F", "to out")
    assert "".join(text for _, text in out[1:-1]) == "x" * 20000
    assert [tag for tag, _ in out] == ["F", "P", "F", "P"]


@pytest.mark.reference
def test_port_forward(cri: Cri) -> None:
    """Whether the server listens on the loopback alone, or on every address."""
    pod = cri.run_pod()
    servers = [(8080, "127.0.0.1"), (8081, "0.0.0.0")]
    if cri.handler != "runc":  # containerd asks /etc/hosts for localhost, and where that has IPv4 only, so has it
        servers.append((8082, "[::1]"))
    script = "; ".join(f"httpd -h /tmp -p {address}:{port}" for port, address in servers)
    container = pod.start("sh", "-c", f"echo it works > /tmp/file; {script}; sleep 100000")
    wait_for(lambda: pod.sh(container, "netstat -ltn").count(":808") == len(servers), "they listen")
    for port, _ in servers:
        for _ in range(2):
            answer = cri("PortForward", pod_sandbox_id=pod.id, port=[port])
            with open_tunnel(answer.url, cri.node.netns, port) as tunnel:
                tunnel.send(b"GET /file HTTP/1.0\r\n\r\n")
                tunnel.expect(b"^HTTP/1.[01] 200 OK\r\n.*\r\n\r\nit works\n$", channel=DATA)


@pytest.mark.reference
def test_port_forward_to_nobody(pod: Pod) -> None:
    """The user is told at once. With kata the connection is made before the guest is asked, and is reset then."""
    answer = pod.cri("PortForward", pod_sandbox_id=pod.id, port=[8081])
    with open_tunnel(answer.url, pod.cri.node.netns, 8081) as tunnel:
        tunnel.expect(b"8081.*(refused|reset)", channel=ERROR, limit_s=180)
