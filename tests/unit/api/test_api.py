"""The library on a VMM that runs nothing and a guest whose processes are this program's: what is asked for, what comes
back, and that nothing is left."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

import katapod
from katapod.api import container as api_container
from katapod.api import context, streams
from katapod.api import sandbox as api_sandbox
from katapod.model.config import Config
from katapod.observe.management_server import management_server
from katapod.plan.virtiofsd import VirtiofsdImplementation
from katapod.sandbox import container, opening, share, shared_volumes, task
from katapod.sandbox.lifecycle import Sandbox
from katapod.sandbox.planning import plan_sandbox
from katapod.sandbox.rootfs import GuestRootfs
from katapod.vmm.errors import VmmFailed
from katapod.vmm.proof import AcceleratorChoice
from katapod.vmm.spec import Accelerator
from kit.entry_point import EntryPoint
from kit.fake_guest import FakeGuest
from kit.fake_vmm import FakeVmm
from kit.stage import Stage, stage_at

ROOT = Path("/")
"""In place of an image: nothing of it is read."""


@pytest.fixture
async def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    async with stage_at(tmp_path, monkeypatch) as found:
        found.vmm = FakeVmm(agent=FakeGuest())

        async def choice(*args: Any) -> AcceleratorChoice:
            return AcceleratorChoice(Accelerator.TCG, "there is no /dev/kvm", fresh=False)

        async def implementation(program: str) -> VirtiofsdImplementation:
            return VirtiofsdImplementation.RUST

        async def rootfs(sandbox: Sandbox, container_id: str, *args: Any) -> GuestRootfs:
            (sandbox.paths.layers / container_id).mkdir()
            return GuestRootfs("/root")

        config = Config()
        config = msgspec.structs.replace(config, katapod=msgspec.structs.replace(config.katapod, network="none"))
        monkeypatch.setattr(opening, "plan_sandbox", partial(plan_sandbox, vmm=found.vmm))
        monkeypatch.setattr(opening, "accelerator_for", choice)
        for asking in (opening, share):
            monkeypatch.setattr(asking, "virtiofsd_implementation", implementation)
        monkeypatch.setattr(container, "open_rootfs", rootfs)
        monkeypatch.setattr(task, "OOM_WORD_S", 0.02)
        monkeypatch.setattr(shared_volumes, "bind", lambda *args, **more: None)
        monkeypatch.setattr(context, "Layout", lambda: found.store.layout)
        monkeypatch.setattr(context, "read_config", lambda path, annotations: config)
        for module in (api_container, api_sandbox):
            monkeypatch.setattr(module, "need_root", lambda what: None)
        yield found
        assert found.store.ids() == []


def guest_of(stage: Stage) -> FakeGuest:
    assert isinstance(stage.vmm.agent, FakeGuest)
    return stage.vmm.agent


# -- an entry point by public names


async def test_an_entry_point(stage: Stage) -> None:
    entry = EntryPoint()
    await entry.create("c1", ROOT, "cat")
    assert entry.state("c1") == "created"
    process = await entry.start("c1")
    assert entry.state("c1") == "running"
    assert await entry.exec("c1", "echo", "beside", "it") == katapod.Completed(0, b"beside it\n", b"")
    assert await entry.exec("c1", "cat", input=b"in") == katapod.Completed(0, b"in", b"")
    assert await process.communicate(b"through") == (b"through", b"")
    assert await entry.wait("c1") == 0
    assert entry.state("c1") == "stopped"
    await entry.create("c2", ROOT, "sleep")
    await entry.start("c2")
    await entry.kill("c2", "TERM")
    assert await entry.wait("c2") == 143
    await entry.delete("c1")
    await entry.create("c3", ROOT, "sleep")
    await entry.start("c3")
    await entry.close()
    assert stage.vmm.machines[-1].said[-1] in ("stop", "kill")


def test_its_sandboxes_can_be_observed() -> None:
    assert context.run_context().servers == (management_server,)


# -- run


async def test_run(stage: Stage) -> None:
    done = await katapod.run(ROOT, "echo", "hello")
    assert (done.exit_code, done.text, done.stderr) == (0, "hello\n", b"")
    assert await katapod.run(ROOT, "cat", input=b"a" * 300_000) == katapod.Completed(0, b"a" * 300_000, b"")
    assert (await katapod.run(ROOT, "false")).exit_code == 1
    with pytest.raises(katapod.CommandFailed, match="cannot run false: status 1: no") as caught:
        await katapod.run(ROOT, "false", check=True)
    assert caught.value.completed.stderr == b"no\n"


async def test_what_a_container_is_asked_for_arrives(stage: Stage, tmp_path: Path) -> None:
    async with katapod.Container.create(
        ROOT, "env", name="c1", env={"A": "b"}, memory="64m", cpus=0.5, labels={"x": "y"}, volumes=[f"{tmp_path}:/data"]
    ) as made:
        (info,) = await katapod.Sandbox.list()
        assert (info.id, info.labels, info.state, info.lost) == ("c1", {"x": "y"}, katapod.State.RUNNING, False)
        assert made.info() == info.containers[0]
        assert (made.info().image, made.info().command) == ("/", ("env",))
        assert await katapod.Sandbox.find("c1") == info
        process = await made.start(stdout=katapod.PIPE)
        out, _ = await process.communicate()
        assert b"A=b\n" in out
    assert await katapod.Sandbox.list() == ()


async def test_a_command_that_is_not_there(stage: Stage) -> None:
    with pytest.raises(katapod.CommandNotFound):
        await katapod.run(ROOT, "nothing")


async def test_a_start_that_fails(stage: Stage) -> None:
    stage.vmm.fails["start"] = VmmFailed("cannot start")
    with pytest.raises(katapod.KatapodError, match="cannot start"):
        await katapod.run(ROOT, "echo")


@pytest.mark.parametrize("limit_s", [0.0, 0.3])
async def test_a_run_that_takes_too_long(limit_s: float, stage: Stage) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(limit_s):
            await katapod.run(ROOT, "sleep")


# -- a container's life


async def test_a_block_that_fails_ends_the_container(stage: Stage) -> None:
    async def fail() -> None:
        async with katapod.Container.create(ROOT, "sleep") as made:
            await made.start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()


async def test_a_container_is_started_once(stage: Stage) -> None:
    async with katapod.Container.create(ROOT, "sleep", name="c1") as made:
        with pytest.raises(katapod.InvalidState, match="cannot wait for container c1: it was not started"):
            await made.wait()
        with pytest.raises(katapod.InvalidState, match="cannot exec in container c1: it is created"):
            await made.run("echo")
        await made.start()
        with pytest.raises(katapod.InvalidState, match="cannot start container c1: it is running"):
            await made.start()
        with pytest.raises(katapod.AlreadyExists):
            async with katapod.Container.create(ROOT, "sleep", name="c1"):
                pass
        await made.pause()
        assert made.info().state is katapod.State.PAUSED
        await made.resume()
        await made.kill()
        assert await made.wait() == 137
        with pytest.raises(katapod.InvalidState):
            await made.kill()


async def test_a_sandbox_that_dies_says_why(stage: Stage) -> None:
    async with katapod.Container.create(ROOT, "sleep") as made:
        process = await made.start()
        stage.vmm.vm.end(1)
        with pytest.raises(katapod.KatapodError, match="the VMM ended unexpectedly: status 1"):
            await made.wait()
        assert process.exit_code is None
        with pytest.raises(katapod.KatapodError, match="the VMM ended unexpectedly: status 1"):
            await made.run("echo")


# -- execs and their streams


async def test_an_exec_with_its_streams_by_hand(stage: Stage) -> None:
    async with katapod.Container.create(ROOT, "sleep") as made:
        await made.start()
        async with made.exec("cat", stdin=katapod.PIPE, stdout=katapod.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is None
            await process.stdin.write(b"one\ntwo")
            assert await process.stdout.readline() == b"one\n"
            process.stdin.close()
            assert [line async for line in process.stdout] == [b"two"]
            assert (await process.wait(), process.exit_code) == (0, 0)
            with pytest.raises(BrokenPipeError):
                await process.stdin.write(b"more")


async def test_an_exec_that_nobody_waits_for_is_killed(stage: Stage) -> None:
    async with katapod.Container.create(ROOT, "sleep", name="c1") as made:
        await made.start()
        async with made.exec("yes", stdout=katapod.PIPE) as process:
            assert process.stdout is not None
            assert await process.stdout.read(4) == b"y\ny\n"
        assert process.exit_code == 137
        async with made.exec("sleep") as process:
            await process.kill(15)
            assert await process.wait() == 143
        assert made.info().state is katapod.State.RUNNING


async def test_output_has_a_limit(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    from katapod.api import process as module

    monkeypatch.setattr(module, "OUTPUT_MAX", 1 << 20)
    async with katapod.Container.create(ROOT, "sleep") as made:
        await made.start()
        assert len((await made.run("cat", input=bytes(1 << 20))).stdout) == 1 << 20
        with pytest.raises(katapod.KatapodError, match="it is more than 1 MiB"):
            await made.run("cat", input=bytes((1 << 20) + 1))


async def test_streams_can_be_files(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"from a file")
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as sink:
        async with katapod.Container.create(ROOT, "cat") as made:
            await made.start(stdin=source, stdout=sink)
            assert await made.wait() == 0
    assert (tmp_path / "out").read_bytes() == b"from a file"


# -- several containers in one sandbox


async def test_a_sandbox_of_several(stage: Stage) -> None:
    async with katapod.Sandbox.open(name="s1", labels={"a": "b"}) as sandbox:
        assert (sandbox.id, sandbox.info().containers) == ("s1", ())
        async with contextlib.AsyncExitStack() as both:
            first = await both.enter_async_context(sandbox.create(ROOT, "sleep", name="one"))
            second = await both.enter_async_context(sandbox.create(ROOT, "sleep", name="two", memory="64m"))
            await first.start()
            assert first.sandbox_id == second.sandbox_id == "s1"
            assert [item.id for item in sandbox.info().containers] == ["one", "two"]
            assert len(stage.vmm.machines) == 1
            assert (await first.run("echo", "x")).text == "x\n"
            assert "HOSTNAME=s1\n" in (await first.run("env")).text, "its containers share the VM's name"
        assert sandbox.info().containers == ()
        assert guest_of(stage).processes == {}
        async with sandbox.create(ROOT, "echo", name="one") as again:
            await again.start()
            assert await again.wait() == 0
        with pytest.raises(TypeError, match="unknown option of a container: network"):
            async with sandbox.create(ROOT, "echo", network="none"):  # type: ignore[call-arg]
                pass


# -- another's


async def test_attach(stage: Stage) -> None:
    async with katapod.Container.create(ROOT, "sleep", name="c1") as made:
        await made.start()
        async with katapod.Container.attach("c1") as other:
            assert other.info() == made.info()
            assert (await other.run("cat", input=b"through the socket")).stdout == b"through the socket"
            with pytest.raises(katapod.InvalidState, match="cannot start container c1: it is running"):
                await other.start()
            await other.pause()
            await other.resume()
            async with other.exec("sleep") as process:
                await process.kill()
                assert await process.wait() == 137
            await other.kill("TERM")
            assert await made.wait() == 143
    with pytest.raises(katapod.NotFound):
        async with katapod.Container.attach("c1"):
            pass


async def test_the_end_of_one_that_is_attached(stage: Stage) -> None:
    async with contextlib.AsyncExitStack() as life:
        made = await life.enter_async_context(katapod.Container.create(ROOT, "sleep", name="c1"))
        await made.start()
        async with katapod.Container.attach("c1") as other:
            waiting = asyncio.create_task(other.wait())
            async with other.exec("sleep") as process:
                stage.vmm.vm.end(1)
                with pytest.raises(katapod.KatapodError, match="of container c1: the VMM ended unexpectedly: status 1"):
                    await process.wait()
            await life.aclose()
            with pytest.raises(katapod.NotFound, match="cannot find container c1: it was removed when it ended"):
                await waiting


async def test_delete(stage: Stage) -> None:
    async with katapod.Container.create(ROOT, "sleep", name="c1"):
        with pytest.raises(katapod.InvalidState, match="it is running"):
            await katapod.Sandbox.delete("c1")
    with pytest.raises(katapod.NotFound):
        await katapod.Sandbox.delete("c1")


# -- what makes no sense


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": 1}, "cannot use memory '1'"),
        ({"cpus": -1.0}, "cannot use cpus"),
        ({"volumes": ["nowhere"]}, "cannot use volumes 'nowhere'"),
        ({"volumes": [katapod.Volume(source="x", destination="/y")]}, "the source is not an absolute path"),
        ({"volumes": [katapod.Volume(source="/x", destination="/../y")]}, "has a '..' component"),
        ({"env": {"": "x"}}, "cannot use env"),
        ({"network": "host"}, "cannot use network 'host'"),
        ({"accelerator": "fast"}, "cannot use accelerator 'fast'"),
        ({"stop_signal": "NOPE"}, "cannot use stop_signal 'NOPE'"),
        ({"cwd": "here"}, "the working directory must be an absolute path"),
        ({"name": "-"}, "as a container name"),
    ],
)
async def test_what_makes_no_sense(options: dict[str, Any], words: str, stage: Stage) -> None:
    with pytest.raises(katapod.UsageError, match=words):
        await katapod.run(ROOT, "echo", **options)
    assert stage.vmm.machines == []


async def test_streams_that_make_no_sense(stage: Stage) -> None:
    import io

    async with katapod.Container.create(ROOT, "sleep") as made:
        for wrong in (io.BytesIO(), 12345, -7):
            with pytest.raises(katapod.UsageError, match="as stdout: it has no descriptor that is open"):
                await made.start(stdout=wrong)
        await made.start()


async def test_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(katapod.KatapodError, match="this needs root"):
        await katapod.run(ROOT, "echo")


# -- streams in memory


async def test_a_reader_that_is_full_waits() -> None:
    reader = streams.OutputReader()
    await reader.write(bytes(streams.BUFFER_MAX))
    writing = asyncio.create_task(reader.write(b"more"))
    await asyncio.sleep(0)
    assert not writing.done()
    assert len(await reader.read(10)) == 10
    await writing
    reader.close()
    assert len(await reader.read()) == streams.BUFFER_MAX - 10 + 4
    assert await reader.read() == b""


async def test_lines() -> None:
    reader = streams.OutputReader()
    await reader.write(b"one\n\ntwo")
    assert [await reader.readline(), await reader.readline()] == [b"one\n", b"\n"]
    rest = asyncio.create_task(reader.readline())
    await asyncio.sleep(0)
    await reader.write(b"!\n")
    assert await rest == b"two!\n"
    await reader.write(b"x" * streams.BUFFER_MAX)
    assert len(await reader.readline()) == streams.BUFFER_MAX
    reader.close()
    assert await reader.readline() == b""
