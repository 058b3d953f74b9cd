"""Lay out the guest's files in a directory, as planned, and have dracut pack it.

dracut resolves the shared libraries of the binaries and writes the archive. It sees only a module directory of ours
(environment variable `dracutbasedir`): nothing is added to the host's dracut, the host's configuration is not read, and
the host's initramfs can never contain our module.
"""

import asyncio
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from katapod.host.process import ProcessFailed, find_program, run
from katapod.osbuilder.elf_needs import ElfFormatError, drop_needed
from katapod.osbuilder.errors import OsbuilderError
from katapod.osbuilder.guest_python import Interpreter, compile_python
from katapod.osbuilder.module_file import pack_module, read_module, slim_module
from katapod.plan.guest_image import FileKind, GuestImagePlan, PythonFileKind
from katapod.tasks import finish

__all__ = ["DRACUT_MODULES", "in_thread", "run_dracut", "stage_guest"]

DRACUT_MODULES = Path(__file__).with_name("dracut")
DRACUT_BASE = Path("/usr/lib/dracut")
DRACUT_LIMIT_S = 300.0
FIXED_TIME = 1  # mtime of everything in the image; not 0, which some tools take for "unset"

log = logging.getLogger(__name__)

_T = TypeVar("_T")


async def in_thread(work: Callable[[], _T]) -> _T:
    """Run disk-heavy work in a thread. A cancellation waits for its end, so that the thread never writes to a directory
    that is being removed."""
    return await finish(asyncio.to_thread(work))


async def stage_guest(plan: GuestImagePlan, module_dir: Path, interpreter: Interpreter, stage: Path) -> None:
    """Fill `stage` with everything but ELF files."""
    await in_thread(lambda: _stage_files(plan, module_dir, stage))
    await compile_python(interpreter, plan.python_files, stage)
    await _run_depmod(plan, stage)


def _stage_files(plan: GuestImagePlan, module_dir: Path, stage: Path) -> None:
    for directory in plan.directories:
        _inside(stage, directory).mkdir(parents=True, exist_ok=True)
    _inside(stage, "/tmp").chmod(0o1777)  # noqa: S108 - the guest's
    for text in plan.texts:
        path = _inside(stage, text.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.content)
        path.chmod(text.mode)
    for name, target in plan.symlinks:
        path = _inside(stage, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
    _stage_node_files(plan, stage)
    for file in plan.python_files:
        if file.kind is PythonFileKind.DATA:
            path = _inside(stage, file.target)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.source, path)
    for module in plan.modules.all:
        path = _inside(stage, f"{plan.module_root}/{module.target}")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = slim_module(read_module(module_dir / module.source))
        path.write_bytes(pack_module(content) if module.packed else content)
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo", "modules.softdep"):
        if (module_dir / name).is_file():
            shutil.copyfile(module_dir / name, _inside(stage, plan.module_root) / name)
    _link_applets(plan, stage)


def _stage_node_files(plan: GuestImagePlan, stage: Path) -> None:
    for file in plan.files:
        if file.kind is FileKind.PROGRAM:
            continue  # dracut adds it, with its libraries
        path = _inside(stage, file.target)
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.kind is FileKind.LINK:
            path.symlink_to(file.source)
        elif file.kind is FileKind.DIRECTORY:
            path.mkdir(exist_ok=True)
            path.chmod(file.mode)
        else:
            shutil.copyfile(file.source, path)
            path.chmod(file.mode)


def _link_applets(plan: GuestImagePlan, stage: Path) -> None:
    """Hard links: in the guest's memory each of 280 symbolic links would take a page."""
    busybox = next((p for p in plan.programs if p.target.endswith("/busybox")), None)
    if busybox is None:
        return
    first = _inside(stage, busybox.target)
    first.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(busybox.source, first)
    for link in plan.applet_links:
        path = _inside(stage, link)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(path):
            os.link(first, path)


def _inside(stage: Path, guest_path: str) -> Path:
    return stage / guest_path.lstrip("/")


async def _run_depmod(plan: GuestImagePlan, stage: Path) -> None:
    """Write modprobe's index of the modules in the image. depmod expects lib/, which is usr/lib in the guest."""
    alias = stage / "lib"
    alias.symlink_to("usr/lib")
    try:
        await run(
            [find_program("depmod", package="kmod"), "-b", str(stage), plan.kernel_version],
            timeout_s=60,
        )
    except ProcessFailed as exc:
        raise OsbuilderError(f"cannot index the guest's kernel modules: {exc}") from exc
    finally:
        alias.unlink()


async def run_dracut(plan: GuestImagePlan, stage: Path, work: Path, *, compress: str) -> Path:
    """Make the initrd from `stage` and the binaries of `plan`. Returns its path, below `work`."""
    dracut = find_program("dracut", package="dracut-core")
    await in_thread(lambda: _prepare_dracut(plan, work))
    # Arguments that vary between builds would end up in the image (lib/dracut/build-parameter.txt).
    argv = [dracut, "--quiet", "--force", "--no-hostonly", "--no-hostonly-cmdline", "--no-kernel"]
    argv += ["--no-early-microcode", "--nofscks", "--nomdadmconf", "--nolvmconf", "--nostrip", "--nohardlink"]
    argv += ["--reproducible", "--conf", "./dracut.conf", "--confdir", "./dracut.conf.d", "--modules", "katapod"]
    argv += ["--no-compress"] if compress == "none" else ["--compress", COMPRESSORS[compress]]
    done = work / "module-done"
    environment = {
        "dracutbasedir": str(work / "dracut"),
        "TMPDIR": str(work),
        "KATAPOD_STAGE": str(stage),
        "KATAPOD_BINARIES": str(work / "binaries"),
        "KATAPOD_DONE": str(done),
        "KATAPOD_HOOK": plan.hook,
        "KATAPOD_HOOK_LOG": str(work / "hook.log"),
    }
    try:
        completed = await run(
            [*argv, "./initrd", plan.kernel_version], cwd=work, env=environment, timeout_s=DRACUT_LIMIT_S
        )
    except ProcessFailed as exc:
        raise OsbuilderError(f"cannot build the initrd: {exc}") from exc
    initrd = work / "initrd"
    hook_log = work / "hook.log"
    if not done.exists() and hook_log.exists():
        said = hook_log.read_text(errors="replace").strip()[-2000:]
        raise OsbuilderError(f"cannot build the initrd: the hook {plan.hook} failed: {said or 'no output'}")
    if not done.exists() or not initrd.is_file():
        said = (completed.stderr or completed.stdout).strip()[-2000:]
        raise OsbuilderError(f"cannot build the initrd: dracut left out our module: {said}")
    return initrd


COMPRESSORS = {
    "lz4": "lz4 -l -9",
    "zstd": "zstd -19 -q -T1",
    "gzip": "gzip -n -9",
}
"""Command lines, not names: dracut's options for a name differ between versions, and so would the image."""


def _prepare_dracut(plan: GuestImagePlan, work: Path) -> None:
    base = work / "dracut"
    modules = base / "modules.d"
    modules.mkdir(parents=True)
    for path in DRACUT_BASE.iterdir():
        if path.name == "modules.d":
            continue
        if path.name == "dracut-functions.sh":
            # dracut --reproducible sets newer files to the time of this one.
            shutil.copyfile(path, base / path.name)
            os.utime(base / path.name, (FIXED_TIME, FIXED_TIME))
        else:
            (base / path.name).symlink_to(path)
    for module in sorted(DRACUT_MODULES.iterdir()):
        shutil.copytree(module, modules / module.name)
        (modules / module.name / "module-setup.sh").chmod(0o755)
    (work / "dracut.conf").touch()
    (work / "dracut.conf.d").mkdir()
    (work / "binaries").write_text(
        "".join(f"{source}\t{target}\n" for source, target in _slim_binaries(plan, work / "binaries.d"))
    )


def _slim_binaries(plan: GuestImagePlan, directory: Path) -> Iterator[tuple[Path, str]]:
    """(source, target) of each ELF file; the source is a changed copy in `directory` if a library is to be left out."""
    directory.mkdir()
    jobs = [(program.source, program.target, program.without, False) for program in plan.programs]
    jobs += [(file.source, file.target, (), False) for file in plan.files if file.kind is FileKind.PROGRAM]
    jobs += [
        (file.source, file.target, ("libstdc++.so.6",), True)
        for file in plan.python_files
        if file.kind is PythonFileKind.LIBRARY
    ]
    for number, (source, target, libraries, only_unused) in enumerate(jobs):
        data = original = Path(source).read_bytes() if libraries else b""
        try:
            for library in libraries:
                data = drop_needed(data, library, only_unused=only_unused)
        except ElfFormatError as exc:
            log.warning("%s comes with all its libraries: %s", source, exc)
            data = original
        if data == original:
            yield Path(source), target
            continue
        copy = directory / f"{number}-{Path(target).name}"
        copy.write_bytes(data)
        copy.chmod(0o755)
        yield copy, target
