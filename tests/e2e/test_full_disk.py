"""The host's disk is full: the cause is told at every door, with the host's path, and nothing is left lying."""

import json
import shlex
import subprocess
from pathlib import Path

from kit.kata import Kata
from kit.templates import kata_command

SANDBOXES = Path("/var/lib/katapod/sandboxes")

ALL_DOORS = """
mount -t tmpfs -o size=40m tmpfs {sandboxes}
{kata} run -d --name {name} busybox sh -c {script}
for each in $(seq 400); do  # until it has ended: some minutes
    {kata} list | grep -q '^{name} .* stopped ' && break
    sleep 0.5
done
echo '|'; {kata} list --json
echo '|'; {kata} list
echo '|'; {kata} logs {name} 2>&1
echo '|'; {kata} inspect {name} --json
echo '|'; {kata} delete {name}
{kata} run --rm --name {name} busybox sh -c {script} 2>&1
echo "|$?"
"""


def test_a_layer_that_cannot_be_written(kata: Kata) -> None:
    """In mount namespaces of its own with a small file system for layers and logs: other containers have theirs."""
    name = kata.name()
    script = ALL_DOORS.format(
        sandboxes=SANDBOXES,
        kata=shlex.join(kata_command()),
        name=name,
        # dd may well succeed: nothing is written before the guest finds the time
        script=shlex.quote("dd if=/dev/zero of=/big bs=1M count=100 2>/dev/null; sync; sleep 1000"),
    )
    SANDBOXES.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=800, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    _, rows, table, logged, inspected, attached = done.stdout.split("|\n")
    attached, code = attached.rsplit("|", 1)
    cause = f"the host cannot write {SANDBOXES}/{name}/files/root.qcow2: No space left on device"
    (row,) = [each for each in json.loads(rows) if each["name"] == name]
    assert (row["state"], row["exit_code"]) == ("stopped", 137)
    assert row["error"].endswith(cause)
    assert f"{name}: sandbox {name} was ended: {cause}\n" in table
    assert logged.endswith(f"kata-runtime: {name}: sandbox {name} was ended: {cause}\n")
    assert json.loads(inspected)["error"].endswith(cause)
    assert cause.replace("/files/", f"/layers/{name}/") in attached  # --rm: of it nothing stays
    assert code == "125\n"


def test_a_log_and_a_shared_layer_that_cannot_be_written(kata: Kata, tmp_path: Path) -> None:
    """By virtio-fs the program itself is told, as on any full disk; its output goes on, though the log is cut."""
    config = tmp_path / "configuration.toml"
    config.write_text('[katapod]\nrootfs = "virtio-fs"\n')
    name = kata.name()
    run = [*kata_command("--config", str(config)), "run", "--name", name, "busybox", "sh", "-c"]
    inside = "dd if=/dev/zero of=/big bs=1M count=100 2>&1; seq 100000; echo end"
    script = (
        f"mount -t tmpfs -o size=20m tmpfs {SANDBOXES}; {shlex.join([*run, inside])}; "
        f"echo '|'; {shlex.join(kata_command('logs', name))} 2>&1; {shlex.join(kata_command('delete', name))}"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=600, check=False
    )
    said, kept = done.stdout.split("|\n")
    incomplete = f"the log {SANDBOXES}/{name}/container.log is not complete: No space left on device"
    assert said.startswith("dd: error writing '/big': No space left on device\n")
    assert said.endswith("100000\nend\n"), "nothing of what it wrote is lost to who reads it"
    assert done.stderr.splitlines() == [f"kata-runtime: WARNING: {incomplete}"]
    assert kept.endswith(f"kata-runtime: {name}: {incomplete}\n{name}\n"), "logs, then delete"
