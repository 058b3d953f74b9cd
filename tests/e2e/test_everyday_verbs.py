"""Verbs of every day on a real VM, as scripts for docker use them."""

import io
import os
import tarfile
from pathlib import Path

from kit.kata import Kata, wait_for


def is_connected(pid: int) -> bool:
    """To a supervisor: asyncio has a pair of sockets for itself."""
    links = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir() if each.is_symlink()]
    return sum(link.startswith("socket:") for link in links) > 2


def test_wait_prints_how_containers_end(kata: Kata) -> None:
    name = kata.start("busybox", "sh", "-c", "until test -e /end; do sleep 0.1; done; exit 5")
    with kata.spawn("wait", name, stdout=-1) as waiting:
        wait_for(lambda: is_connected(waiting.pid), "who waits is heard")
        kata.let_end(name, "/end")
        assert waiting.stdout is not None
        assert waiting.stdout.read() == b"5\n"
    assert kata.ok("wait", name) == "5\n"  # one that has ended
    assert kata.ok("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", name) == "exited 5\n"
    kata.ok("delete", name)  # at once: nobody holds it any more


def test_wait_for_one_that_removes_itself(kata: Kata) -> None:
    name = kata.start("--rm", "busybox", "sh", "-c", "until test -e /end; do sleep 0.1; done; exit 6")
    with kata.spawn("wait", name, stdout=-1) as waiting:
        wait_for(lambda: is_connected(waiting.pid), "who waits is heard")
        kata.let_end(name, "/end")
        assert waiting.stdout is not None
        assert waiting.stdout.read() == b"6\n"


def test_stop_asks_first(kata: Kata) -> None:
    asked = kata.start("busybox", "sh", "-c", "trap 'exit 9' TERM; touch /ready; while :; do sleep 0.1; done")
    wait_for(lambda: kata("exec", asked, "test", "-e", "/ready").code == 0, "its handler")
    assert kata.ok("stop", asked) == f"{asked}\n"
    assert kata.ok("wait", asked) == "9\n"
    deaf = kata.start("busybox", "sleep", "3600")  # the first process of a namespace, without a handler
    assert kata.ok("stop", "-t", "0", deaf) == f"{deaf}\n"
    assert kata.ok("wait", deaf) == "137\n"
    assert kata.ok("stop", deaf) == f"{deaf}\n"


def test_kill_as_of_kill(kata: Kata) -> None:
    name = kata.start("busybox", "sleep", "3600")
    kata.ok("kill", "-9", name)
    assert kata.ok("wait", name) == "137\n"


def follows(pid: int) -> bool:
    """Whether a process has the log of a container open."""
    return any(os.readlink(each).endswith("/container.log") for each in Path(f"/proc/{pid}/fd").iterdir())


def test_attach_prints_what_comes_and_ends_with_it(kata: Kata) -> None:
    script = "echo before; until test -e /go; do sleep 0.1; done; echo after; echo err >&2; exit 4"
    name = kata.start("busybox", "sh", "-c", script)
    wait_for(lambda: kata.ok("logs", name) == "before\n", "its first line")
    with kata.spawn("attach", name, stdout=-1, stderr=-1) as attached:
        wait_for(lambda: follows(attached.pid), "a thread that follows the log")
        kata.let_end(name, "/go")
        out, err = attached.communicate(timeout=180)
    assert (attached.returncode, out, err) == (4, b"after\n", b"err\n")


def test_copies(kata: Kata, tmp_path: Path) -> None:
    name = kata.start("busybox", "sleep", "3600")
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "tree" / "sub" / "file").write_text("content")
    kata.ok("cp", str(tmp_path / "tree"), f"{name}:/srv")
    kata.ok("cp", str(tmp_path / "tree" / "sub" / "file"), f"{name}:/srv/renamed")
    kata.ok("cp", f"{tmp_path}/tree/.", f"{name}:/mnt")
    found = kata.ok("exec", name, "cat", "/srv/tree/sub/file", "/srv/renamed", "/mnt/sub/file")
    assert found == "content" * 3
    kata.ok("cp", f"{name}:/srv/tree", str(tmp_path / "back"))
    assert (tmp_path / "back" / "sub" / "file").read_text() == "content"
    kata.ok("cp", f"{name}:/etc/hostname", str(tmp_path))
    assert (tmp_path / "hostname").read_text() == f"{name[:63]}\n"
    _, data, _ = kata.binary("cp", f"{name}:/srv/tree", "-")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert "tree/sub/file" in archive.getnames()
    missing = kata("cp", f"{name}:/none", str(tmp_path))
    assert (missing.code, "tar in container" in missing.stderr) == (1, True)
    kata.ok("export", "-o", str(tmp_path / "all.tar"), name)
    with tarfile.open(tmp_path / "all.tar") as archive:
        names = archive.getnames()
    assert "srv/renamed" in names
    assert not any(each.startswith(("proc", "sys", "dev")) for each in names)


def test_what_a_container_has_changed(kata: Kata, tmp_path: Path) -> None:
    name = kata.start("-v", f"{tmp_path}:/mnt", "--tmpfs", "/scratch", "busybox", "sleep", "3600")
    assert "passwd" not in kata.ok("diff", name)
    script = (
        "mkdir /srv/new; echo x > /srv/new/file; echo x >> /etc/passwd; rm /etc/group; touch /mnt/x /scratch/x /tmp/x"
    )
    kata.ok("exec", name, "sh", "-c", script)
    told = kata.ok("diff", name).splitlines()
    assert [line for line in told if "mnt" not in line and "scratch" not in line] == [
        *("C /etc", "D /etc/group", "C /etc/passwd", "C /srv", "A /srv/new", "A /srv/new/file", "C /tmp", "A /tmp/x"),
    ]
    assert not any("/x" in line for line in told if "/tmp" not in line)
    kata.ok("stop", "-t", "0", name)
    stopped = kata("diff", name)
    assert (stopped.code, "it does not run" in stopped.stderr) == (1, True)


def test_exec_in_the_background_and_by_file(kata: Kata, tmp_path: Path) -> None:
    name = kata.start("busybox", "sleep", "3600")
    (tmp_path / "env").write_text("A=from a file\n")
    assert kata.ok("exec", "--env-file", str(tmp_path / "env"), name, "sh", "-c", "echo $A") == "from a file\n"
    assert kata.ok("exec", "-d", name, "sh", "-c", "echo x; touch /done; sleep 3600") == ""
    wait_for(lambda: kata("exec", name, "test", "-e", "/done").code == 0, "the process in the background")
    assert "sleep 3600" in kata.ok("top", name)
    none = kata("exec", "-d", name, "no-such-program")
    assert (none.code, "no-such-program" in none.stderr) == (127, True)


def test_update_changes_limits(kata: Kata) -> None:
    name = kata.start("-m", "128m", "busybox", "sleep", "3600")
    assert kata.ok("update", "-m", "64m", "--cpus", "0.5", "--pids-limit", "50", name) == f"{name}\n"
    files = [f"/sys/fs/cgroup/{each}" for each in ("memory.max", "cpu.max", "pids.max")]
    assert kata.ok("exec", name, "cat", *files).split() == [str(64 << 20), "50000", "100000", "50"]
    much = kata("update", "-m", "900g", name)
    assert (much.code, "its VM has" in much.stderr) == (1, True)


def test_logs_of_a_time(kata: Kata) -> None:
    name = kata.start("busybox", "sh", "-c", "echo one; until test -e /go; do sleep 0.1; done; echo two")
    wait_for(lambda: kata.ok("logs", name) == "one\n", "its first line")
    first = kata.ok("logs", "-t", name).split(" ")[0]
    kata.let_end(name, "/go")
    kata.ok("wait", name)
    assert kata.ok("logs", "--since", first, name) == "one\ntwo\n"
    assert kata.ok("logs", "--until", first[:19] + "Z", name) == ""
    assert kata.ok("logs", "--since", "1h", "--tail", "1", name) == "two\n"
    assert kata.ok("logs", "--tail", "all", name) == "one\ntwo\n"


def test_statistics_by_template(kata: Kata) -> None:
    name = kata.start("-m", "64m", "busybox", "sleep", "3600")
    shown = kata.ok("stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}} {{.MemUsage}}", name)
    assert shown.startswith(f"{name} 1 ")
    assert shown.endswith(" / 64.0 MiB\n")


def test_images_there_and_back(kata: Kata, tmp_path: Path) -> None:
    archive, tag = tmp_path / "image.tar", f"{kata.name()}:1".lower()
    try:
        kata.ok("tag", "busybox", tag)
        assert tag in kata.ok("images", "--format", "{{.Repository}}:{{.Tag}}").splitlines()
        kata.ok("image", "save", "-o", str(archive), tag)
        kata.ok("rmi", tag)
        assert kata.ok("load", "-i", str(archive)) == f"Loaded image: {tag}\n"
        assert kata.run(tag, "echo", "it runs").stdout == "it runs\n"
        assert kata.ok("image", "inspect", "-f", "{{index .RepoTags 0}} {{json .Config.Cmd}}", tag) == f'{tag} ["sh"]\n'
    finally:
        kata("rmi", "-f", tag)


def test_a_reader_that_goes_away(kata: Kata) -> None:
    kata.start("busybox", "sleep", "3600")
    with kata.spawn("list", "--help", stdout=-1, stderr=-1) as listing:
        assert listing.stdout is not None
        listing.stdout.close()
        assert listing.stderr is not None
        assert b"Traceback" not in listing.stderr.read()


def test_commit(kata: Kata) -> None:
    """The image has what the container has written, without what is mounted in it, and starts as it was run."""
    name = kata.start("-e", "A=b", "-v", "/vol", "-w", "/srv", "busybox", "sh", "-c", "echo hello > /made; sleep 3600")
    wait_for(lambda: kata("exec", name, "test", "-s", "/made").code == 0, "its file")
    kata.ok("exec", name, "touch", "/vol/x")
    image = f"{name}-image:1"
    digest = kata.ok("commit", "-m", "why", "-c", 'CMD ["cat", "/made"]', "-c", "LABEL k=v", name, image).strip()
    try:
        assert digest.startswith("sha256:")
        assert kata.run(image).stdout == "hello\n"
        found = kata.run(image, "sh", "-c", "echo $A; pwd; test -e /vol/x || echo no volume").stdout
        assert found == "b\n/srv\nno volume\n"
    finally:
        kata.ok("image", "rm", image)
    stopped = kata("commit", "no-such-thing", image)
    assert (stopped.code, "no-such-thing: no such container" in stopped.stderr) == (1, True)
