"""The image builder for real: dracut packs, QEMU boots what came out. The agent is a stand-in that only
proves itself, so that what is tested here is the image."""

import asyncio
import hashlib
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace
from vm_helper import settled

from katapod.host.process import run
from katapod.kernel.mount import mount, umount
from katapod.model.errors import KatapodError, MissingProgram
from katapod.osbuilder import (
    BuiltImage,
    ImageNotProven,
    ImageRequest,
    KernelMissing,
    KernelUnusable,
    SpaceMissing,
    build_guest_image,
    current_image,
    find_kernel,
)
from kit.packed_modules import modules_packed_each_time, modules_packed_once

INITRD_MAX = 19_682_871  # bytes: the initrd of the walkthrough
TOKEN = "5f1c"
BOOT_LIMIT_S = 240
NEEDED = ("dracut", "crun", "busybox", "depmod", "cpio", "lz4", "qemu-system-x86_64")

AGENT = '''
"""Loads the modules as the real agent does, proves itself and switches the machine off."""
import ctypes
import os
import subprocess

from google._upb import _message


def main():
    libc = ctypes.CDLL(None, use_errno=True)
    for source, target in ((b"proc", b"/proc"), (b"sysfs", b"/sys")):
        assert_ok = libc.mount(source, target, source, 0, None)
        print("mount", target, assert_ok)
    for name in ("early", "late"):
        with open("/etc/katapod/modules-" + name) as paths:
            for path in paths.read().split():
                fd = os.open(path, os.O_RDONLY)
                if libc.syscall(313, fd, b"", 0):
                    print("cannot load", path, os.strerror(ctypes.get_errno()), flush=True)
                os.close(fd)
    for command in (["crun", "--version"], ["modprobe", "squashfs"], ["ls", "/etc/katapod"]):
        done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/sbin:/usr/bin"})
        print("ran", command[0], done.returncode, done.stdout.split("\\n")[0], done.stderr, flush=True)
    with open("/proc/filesystems") as known:
        print("filesystems", known.read().split(), flush=True)
    with open("/proc/cmdline") as words:
        for word in words.read().split():
            if word.startswith("katapod.prove="):
                print("katapod-agent: proven", word.partition("=")[2], flush=True)
    libc.reboot(0x4321FEDC)
'''

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="the image's files are root's"),
    pytest.mark.skipif(any(shutil.which(name) is None for name in NEEDED), reason=f"needs {', '.join(NEEDED)}"),
]


def write_agent(root: Path, source: str = AGENT) -> Path:
    package = root / "standin"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("")
    (package / "main.py").write_text(source)
    return root


async def boot(kernel: Path, initrd: Path) -> str:
    """The console of a machine that boots the image and switches itself off."""
    argv = ["qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max", "-m", "256M", "-nodefaults"]
    argv += ["-no-user-config", "-nographic", "-serial", "stdio", "-no-reboot", "-kernel", str(kernel)]
    argv += ["-initrd", str(initrd), "-append", f"console=ttyS0 quiet panic=1 katapod.prove={TOKEN}"]
    return (await run(argv, timeout_s=BOOT_LIMIT_S)).stdout


async def accept(kernel: Path, initrd: Path) -> None:
    """A proof for tests that are not about the boot."""
    assert kernel.stat().st_size > 1_000_000
    assert initrd.stat().st_size > 1_000_000


def refuse(what: str) -> Callable[[Path, Path], Awaitable[None]]:
    async def prove(kernel: Path, initrd: Path) -> None:
        raise KatapodError(f"{kernel.name} does not boot: {what}")

    return prove


def dracut_tree() -> tuple[str, ...]:
    return tuple(sorted(str(path) for path in Path("/usr/lib/dracut").rglob("*")))


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in (cache / "osbuilder-images").glob(".*") if path.name != ".lock"]


@pytest.fixture(autouse=True, scope="module")
def _modules_packed_once() -> Iterator[None]:
    with modules_packed_once():
        yield


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageRequest, BuiltImage, str, list[tuple[str, float]]]:
    """Built and booted once: (request, image, console, progress)."""
    root = tmp_path_factory.mktemp("osbuilder")
    request = ImageRequest(
        cache_dir=root / "cache",
        packages=("standin",),
        entry_point="standin.main:main",
        source_root=write_agent(root / "src"),
    )
    console: list[str] = []
    steps: list[tuple[str, float]] = []

    async def prove(kernel: Path, initrd: Path) -> None:
        assert current_image(request.cache_dir) is None, "the links must not move before the proof"
        console.append(await boot(kernel, initrd))
        if f"katapod-agent: proven {TOKEN}" not in console[-1]:
            raise KatapodError(console[-1][-3000:])

    image = asyncio.run(build_guest_image(request, prove=prove, progress=lambda *step: steps.append(step)))
    return request, image, console[-1], steps


Proven = tuple[ImageRequest, BuiltImage, str, list[tuple[str, float]]]


@dataclass(frozen=True)
class Repeated:
    """The same request again, twice at once, with a cache of its own; and dracut's files on this machine before."""

    images: list[BuiltImage]
    proofs: list[Path]
    dracut_before: tuple[str, ...]


@pytest.fixture(scope="module")
def repeated(proven: Proven, tmp_path_factory: pytest.TempPathFactory) -> Repeated:
    root = tmp_path_factory.mktemp("repeated")
    request = replace(proven[0], cache_dir=root / "cache", source_root=write_agent(root / "src"))
    proofs: list[Path] = []

    async def prove(kernel: Path, initrd: Path) -> None:
        proofs.append(kernel)

    async def build_both() -> list[BuiltImage]:
        return await asyncio.gather(*(build_guest_image(request, prove=prove) for _ in range(2)))

    before = dracut_tree()
    with modules_packed_each_time():
        return Repeated(asyncio.run(build_both()), proofs, before)


@dataclass(frozen=True)
class Renewed:
    """The image of another agent: first its proof fails, then its kernel boots from its bzImage only."""

    request: ImageRequest
    former: BuiltImage
    bytes_before: bytes
    refusal: str
    current_then: BuiltImage | None  # after the proof that failed
    bytes_then: bytes
    leftovers_then: list[str]
    image: BuiltImage


@pytest.fixture(scope="module")
def renewed(proven: Proven, tmp_path_factory: pytest.TempPathFactory) -> Renewed:
    root = tmp_path_factory.mktemp("renewed")
    request = replace(proven[0], cache_dir=root / "cache", source_root=write_agent(root / "src"))
    shutil.copytree(proven[0].cache_dir, request.cache_dir, symlinks=True)
    former = asyncio.run(build_guest_image(request, prove=refuse("not asked")))
    assert not former.fresh
    before = former.initrd.read_bytes()
    write_agent(request.source_root, AGENT + "\nCHANGED = True\n")

    with pytest.raises(ImageNotProven) as caught:
        asyncio.run(build_guest_image(request, prove=refuse("kernel panic")))
    then = current_image(request.cache_dir), former.initrd.read_bytes(), leftovers(request.cache_dir)

    def prove(kernel: Path, initrd: Path) -> None:
        if kernel.name == "vmlinux":
            raise KatapodError("no answer")

    image = asyncio.run(build_guest_image(request, prove=prove))
    return Renewed(request, former, before, str(caught.value), *then, image)


@pytest.fixture
def request_here(proven: Proven, tmp_path: Path) -> ImageRequest:
    """The same request with a cache and sources of its own."""
    return replace(proven[0], cache_dir=tmp_path / "cache", source_root=write_agent(tmp_path / "src"))


def test_the_image_boots_directly_and_is_small(proven: Proven) -> None:
    request, image, console, _ = proven

    assert image.fresh
    assert image.pvh, image.notes
    assert image.size == image.initrd.stat().st_size <= INITRD_MAX
    assert image.kernel_version == find_kernel().version
    assert replace(image, fresh=False) == current_image(request.cache_dir)
    directory = request.cache_dir / "osbuilder-images" / image.kernel_version
    assert (request.cache_dir / "vmlinuz.container").resolve() == directory / "vmlinux"
    assert (request.cache_dir / "kata-containers-initrd.img").resolve() == image.initrd
    assert image.initrd.name.endswith(f"-kata-{image.kernel_version}.initrd")
    assert "katapod-agent: proven" in console
    assert leftovers(request.cache_dir) == []


def test_all_that_the_guest_needs_works_in_it(proven: Proven) -> None:
    console = proven[2]

    assert "cannot load" not in console
    assert "ran crun 0 crun version" in console
    assert "ran modprobe 0" in console
    assert "ran ls 0 modules-early" in console
    for filesystem in ("'virtiofs'", "'overlay'", "'squashfs'"):
        assert filesystem in console


def test_progress_rises_to_one(proven: Proven) -> None:
    fractions = [done for _, done in proven[3]]

    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)


async def test_a_second_build_does_nothing_and_says_so(proven: Proven) -> None:
    request, image, _, _ = proven
    steps: list[str] = []
    before = image.initrd.stat()

    again = await build_guest_image(request, prove=refuse("not asked"), progress=lambda step, _: steps.append(step))

    assert again == replace(image, fresh=False)
    assert steps[-1] == "up to date"
    assert image.initrd.stat().st_ino == before.st_ino


def test_the_same_inputs_give_the_same_bytes(proven: Proven, repeated: Repeated) -> None:
    image = repeated.images[0]

    assert image.key == proven[1].key
    for one, other in ((image.initrd, proven[1].initrd), (image.kernel, proven[1].kernel)):
        assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()


def test_a_changed_agent_renews_the_image_and_a_failed_proof_keeps_the_former(renewed: Renewed) -> None:
    assert "vmlinux does not boot: kernel panic" in renewed.refusal
    assert "vmlinuz does not boot" in renewed.refusal
    assert renewed.current_then == renewed.former
    assert renewed.bytes_then == renewed.bytes_before
    assert renewed.leftovers_then == []

    assert renewed.image.key != renewed.former.key
    assert current_image(renewed.request.cache_dir) == replace(renewed.image, fresh=False)
    assert leftovers(renewed.request.cache_dir) == []


def test_a_kernel_that_does_not_boot_directly_falls_back_to_its_bzimage(renewed: Renewed) -> None:
    image = renewed.image

    assert not image.pvh
    assert image.kernel.read_bytes() == find_kernel().image.read_bytes()
    assert "no direct boot: vmlinux did not boot: no answer" in image.notes
    assert (renewed.request.cache_dir / "vmlinuz.container").resolve() == image.kernel


def test_two_builders_make_one_image(repeated: Repeated) -> None:
    assert sorted(image.fresh for image in repeated.images) == [False, True]
    assert len(repeated.proofs) == 1


@pytest.mark.parametrize(
    "step", ["unpack the kernel", "lay out files", "pack the initrd", "prove it by a boot (vmlinux)"]
)
async def test_a_cancelled_build_leaves_nothing(request_here: ImageRequest, step: str) -> None:
    reached = asyncio.Event()

    def progress(name: str, _: float) -> None:
        if name == step:
            reached.set()

    async def prove(kernel: Path, initrd: Path) -> None:
        await asyncio.sleep(60)

    build = asyncio.create_task(build_guest_image(request_here, prove=prove, progress=progress))
    await reached.wait()
    await asyncio.sleep(0.3)
    build.cancel()
    with pytest.raises(asyncio.CancelledError):
        await build

    assert leftovers(request_here.cache_dir) == []
    assert current_image(request_here.cache_dir) is None
    assert await settled(lambda: processes_below(request_here.cache_dir) == [])  # all are killed, not all waited for


def processes_below(directory: Path) -> list[str]:
    """Processes that work in `directory` or name it on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            where = os.readlink(process / "cwd")
        except OSError:
            continue
        if str(directory) in command or where.startswith(str(directory)):
            found.append(command)
    return found


async def test_a_truncated_kernel_is_named_before_anything_is_built(request_here: ImageRequest, tmp_path: Path) -> None:
    whole = find_kernel()
    broken = tmp_path / f"vmlinuz-{whole.version}"
    broken.write_bytes(whole.image.read_bytes()[:3_000_000])
    steps: list[str] = []

    with pytest.raises(KernelUnusable, match="it is truncated") as caught:
        await build_guest_image(
            replace(request_here, kernel=str(broken)), prove=accept, progress=lambda step, _: steps.append(step)
        )

    assert steps[-1] == "unpack the kernel"
    assert "lay out files" not in steps
    assert str(broken) in str(caught.value)
    assert leftovers(request_here.cache_dir) == []


async def test_no_kernel_on_this_node(request_here: ImageRequest, tmp_path: Path) -> None:
    with pytest.raises(KernelMissing):
        await build_guest_image(replace(request_here, system_root=tmp_path), prove=accept)
    assert not request_here.cache_dir.exists()


@pytest.mark.parametrize(
    ("program", "package"),
    [("dracut", "dracut-core"), ("crun", "crun"), ("busybox", "busybox-static"), ("depmod", "kmod")],
)
async def test_a_missing_program_is_named_with_its_package(
    request_here: ImageRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, package: str
) -> None:
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in {"dracut", "crun", "busybox", "depmod", "cpio", "ldd"} - {program}:
        (directory / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(directory))

    with pytest.raises(MissingProgram, match=f"cannot run {program}") as caught:
        await build_guest_image(request_here, prove=accept)

    assert f"apt-get install {package}" in caught.value.hint


async def test_a_full_file_system_is_said_to_be_full(request_here: ImageRequest) -> None:
    request_here.cache_dir.mkdir()
    mount("tmpfs", str(request_here.cache_dir), "tmpfs", 0, "size=20m")
    try:
        with pytest.raises(SpaceMissing, match="no space left"):
            await build_guest_image(request_here, prove=accept)
        assert leftovers(request_here.cache_dir) == []
    finally:
        umount(str(request_here.cache_dir))


@pytest.mark.parametrize("step", ["unpack the kernel", "lay out files", "pack the initrd"])
async def test_space_that_runs_out_during_the_build(request_here: ImageRequest, step: str) -> None:
    cache = request_here.cache_dir
    cache.mkdir()
    mount("tmpfs", str(cache), "tmpfs", 0, "size=400m")

    def fill(name: str, _: float) -> None:
        """Another program takes all but 1 MiB."""
        if name == step:
            with (cache / "filler").open("wb") as handle:
                os.posix_fallocate(handle.fileno(), 0, shutil.disk_usage(cache).free - (1 << 20))

    try:
        with pytest.raises(SpaceMissing, match="no space left"):
            await build_guest_image(request_here, prove=accept, progress=fill)
        assert leftovers(cache) == []
    finally:
        umount(str(cache))


def test_the_hosts_dracut_is_left_alone(repeated: Repeated) -> None:
    assert dracut_tree() == repeated.dracut_before
