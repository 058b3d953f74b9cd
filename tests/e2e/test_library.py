"""Katapod as a Python library, on real VMs: an entry point by public names, and every program of its how-to."""

import asyncio
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import katapod
from kit.entry_point import EntryPoint
from kit.kata import Kata

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "python.md"


async def test_an_entry_point(kata: Kata, tmp_path: Path) -> None:
    """create, start, exec, wait, kill and delete; the command line sees what it does."""
    name = kata.name()
    (tmp_path / "given").write_text("by the host")
    entry = EntryPoint()
    try:
        await entry.create(
            name, "busybox", "sh", "-c", "cat; exit 7", memory="64m", volumes=[f"{tmp_path}:/data"], labels={"a": "b"}
        )
        assert entry.state(name) == "created"
        process = await entry.start(name)
        row = await asyncio.to_thread(kata.listed, name)
        assert (row["state"], row["image"], row["labels"]) == ("running", "busybox", {"a": "b"})
        assert (await asyncio.to_thread(kata.ok, "exec", name, "cat", "/data/given")) == "by the host"
        done = await entry.exec(
            name, "sh", "-c", "cat; cat /sys/fs/cgroup/memory.max; echo no >&2; exit 4", input=b"in "
        )
        assert done == katapod.Completed(4, b"in 67108864\n", b"no\n")
        with pytest.raises(katapod.CommandNotFound):
            await entry.exec(name, "nothing-of-that-name")
        data = bytes(range(256)) * 4096
        assert await process.communicate(data) == (data, b"")
        assert await entry.wait(name) == 7
        assert entry.state(name) == "stopped"
        await entry.delete(name)
        assert name not in [one.id for one in await katapod.Sandbox.list()]
        await entry.create(name, "busybox", "sleep", "1000")
        await entry.start(name)
        await entry.kill(name)
        assert await entry.wait(name) == 137
    finally:
        await entry.close()


async def test_what_the_command_line_has_started(kata: Kata) -> None:
    name = kata.start("-e", "COLOUR=blue", "busybox", "sh", "-c", "trap 'exit 9' TERM; while :; do sleep 0.1; done")
    assert (await katapod.Sandbox.find(name)).state is katapod.State.RUNNING
    async with katapod.Container.attach(name) as container:
        assert (await container.run("sh", "-c", "echo $COLOUR")).text == "blue\n"
        await container.kill("TERM")
        assert await container.wait() == 9
        assert container.info().exit_code == 9
    await katapod.Sandbox.delete(name)
    with pytest.raises(katapod.NotFound):
        await katapod.Sandbox.find(name)


async def test_a_memory_limit() -> None:
    done = await katapod.run("busybox", "tail", "/dev/zero", memory="32m")
    assert (done.exit_code, done.oom_killed) == (137, True)


def programs() -> list[tuple[str, str]]:
    """Each of the page, and what it writes."""
    return re.findall(r"^```python\n(.*?)^```\n\n```\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_every_program_of_the_page_has_its_output() -> None:
    assert len(programs()) == PAGE.read_text().count("```python\n")


@pytest.mark.parametrize("number", range(len(programs())))
def test_a_program_of_the_page(number: int, kata: Kata) -> None:
    program, output = programs()[number]
    name = kata.name()
    program, output = program.replace('"box"', f'"{name}"'), re.sub(r"^box\b", name, output, flags=re.MULTILINE)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=180, check=False)
    assert (done.stdout, done.stderr, done.returncode) == (output, "", 0)


HOLDER = """
import asyncio, sys, katapod

async def main(name, directory):
    async with katapod.Container.create("busybox", "sleep", "1000", name=name, volumes=[f"{directory}:/data"]) as made:
        await made.start()
        print("runs", flush=True)
        await made.wait()

if sys.argv[1] == "own":
    katapod.leave_host_mounts()
asyncio.run(main(*sys.argv[2:]))
"""


@pytest.mark.parametrize("mounts", ["own", "host"])
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_a_program_that_is_ended(mounts: str, ending: signal.Signals, kata: Kata, tmp_path: Path) -> None:
    """By SIGINT it unwinds itself; what a killed one leaves is removed by its name, or by the next start."""
    name = kata.name()
    command = [sys.executable, "-c", HOLDER, mounts, name, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"runs\n"
        seen = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"/{name}/" in line]
        assert bool(seen) is (mounts == "host")
        program.send_signal(ending)
        program.communicate(timeout=180)
    if ending is signal.SIGKILL:
        rows = [row for row in json.loads(kata.ok("list", "--json")) if row["name"] == name]
        assert [row["state"] for row in rows] in (["dead"], [])  # another test's start may have removed it
        kata.ok("delete", "--force", name)
    with pytest.raises(katapod.NotFound):
        asyncio.run(katapod.Sandbox.find(name))
