"""Collect what the plan of the guest image needs to know about this node, and compute the key of the image."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from katapod.host.process import find_program, run
from katapod.osbuilder.guest_python import Interpreter, OwnSources, trace_python
from katapod.osbuilder.kernel import InstalledKernel, huge_pages_default
from katapod.osbuilder.node_files import sources_of
from katapod.osbuilder.shared_libraries import shared_libraries
from katapod.osbuilder.stage import COMPRESSORS, DRACUT_BASE, in_thread
from katapod.plan import guest_image, guest_modules, guest_systemd
from katapod.plan.guest_image import (
    FileKind,
    GuestExtras,
    GuestImageFacts,
    GuestProgram,
    ModuleIndex,
    plan_image_modules,
)

__all__ = ["collect_facts", "find_programs", "image_key"]


def find_programs(interpreter: Interpreter) -> tuple[GuestProgram, ...]:
    """The guest's programs. Raises MissingProgram, also for programs that only the build needs."""
    for tool, package in (("dracut", "dracut-core"), ("depmod", "kmod"), ("cpio", "cpio")):
        find_program(tool, package=package)
    crun = find_program("crun", package="crun")
    busybox = find_program("busybox", package="busybox-static")
    ss = find_program("ss", package="iproute2")
    return (
        GuestProgram(str(interpreter.binary), str(interpreter.binary)),
        # crun asks systemd for cgroups; the guest has no systemd, and the agent has crun use cgroupfs.
        GuestProgram(str(Path(crun).resolve()), "/usr/bin/crun", without=("libsystemd.so.0",)),
        GuestProgram(str(Path(busybox).resolve()), "/usr/bin/busybox"),
        # For the debug console. Its RPC names (-r) would bring Kerberos, 1.8 MB.
        GuestProgram(str(Path(ss).resolve()), "/usr/bin/ss", without=("libtirpc.so.3",)),
    )


async def collect_facts(
    kernel: InstalledKernel,
    index: ModuleIndex,
    interpreter: Interpreter,
    own: OwnSources,
    programs: tuple[GuestProgram, ...],
    extras: GuestExtras = GuestExtras(),  # noqa: B008 - frozen
) -> GuestImageFacts:
    busybox = next(program.source for program in programs if program.target.endswith("/busybox"))
    applets = await run([busybox, "--list-full"], timeout_s=10)
    return GuestImageFacts(
        kernel_version=kernel.version,
        module_index=index,
        python_interpreter=str(interpreter.binary),
        python_path=interpreter.path,
        python_files=await trace_python(interpreter, own),
        programs=programs,
        busybox_applets=tuple(applets.stdout.split()),
        huge_pages=huge_pages_default(kernel),
        extras=extras,
        vmm=kernel.vmm,
    )


# long: all that an image is made of
async def image_key(
    kernel: InstalledKernel,
    index: ModuleIndex,
    interpreter: Interpreter,
    own: OwnSources,
    programs: Iterable[GuestProgram],
    extras: GuestExtras = GuestExtras(),  # noqa: B008 - frozen
    *,
    entry_point: str,
    compress: str,
) -> str:
    """A hash over all inputs of the image: some 50 MB, 0.1 s.

    The interpreter and one file of the standard library stand for all of it; other packages are covered by the files
    that our own sources import.
    """
    foreign = _files_of(own.foreign)
    binaries = [Path(program.source) for program in programs]
    added = [Path(file.source) for file in extras.files if file.kind is FileKind.PROGRAM]
    run_here = [kernel.image] if kernel.vmm == "uml" else []
    libraries = await shared_libraries(
        [*binaries, *added, *run_here, *(path for path in foreign if ".so" in path.name)]
    )
    builder = [*sorted(Path(__file__).parent.rglob("*.py")), *sorted(Path(__file__).parent.rglob("*.sh"))]
    modules = [kernel.module_dir / module.source for module in plan_image_modules(index, extras, kernel.vmm).all]
    index_files = [kernel.module_dir / name for name in ("modules.dep", "modules.builtin", "modules.softdep")]
    options = {
        "compress": COMPRESSORS.get(compress, compress),
        "entry_point": entry_point,
        "extras": _options_of(extras),
        "huge_pages": huge_pages_default(kernel),
        "kernel": kernel.version,
        "own": [name for name, _ in own.modules],
        "python_path": interpreter.path,
        "vmm": kernel.vmm,
    }

    def digest() -> str:
        state = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
        for path in (
            kernel.image,
            *index_files,
            *modules,
            *binaries,
            *libraries,
            interpreter.library / "os.py",
            *foreign,
            *(path for _, path in own.modules),
            *own.data,
            *builder,
            *sources_of(extras),
            Path(guest_image.__file__),
            Path(guest_modules.__file__),
            Path(guest_systemd.__file__),
            DRACUT_BASE / "dracut-version.sh",
        ):
            content = path.read_bytes() if path.is_file() else b""
            state.update(f"\n{path.name} {len(content)}\n".encode())
            state.update(content)
        return state.hexdigest()

    return await in_thread(digest)


def _options_of(extras: GuestExtras) -> list[object]:
    """What is not in the content of their files."""
    return [
        extras.flavour,
        extras.load_modules,
        extras.more_modules,
        bool(extras.hook),
        [
            (file.target, file.kind.value, file.mode, file.source if file.kind is FileKind.LINK else "")
            for file in extras.files
        ],
    ]


def _files_of(names: Iterable[str]) -> list[Path]:
    """The files of modules that are neither ours nor the standard library's."""
    from importlib.util import find_spec
    from sys import stdlib_module_names

    found = []
    for name in names:
        if name.split(".")[0] in stdlib_module_names:
            continue
        spec = find_spec(name)
        if spec is not None and spec.has_location and spec.origin:
            found.append(Path(spec.origin))
    return found
